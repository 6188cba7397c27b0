"""Which of six libraries a docstring is from, by the first paragraph alone: new labels for a pretrained encoder.

The texts are read from the libraries as they are installed, in the versions of requirements.lock. Everything that looks
like code (names with dots, underscores or capitals inside, roles, what stands in backticks) and the names of all six
libraries are left out, or they would give the library away. The head is fixed: one that is fitted to the encoder as it
is finds as many, so nothing below it would have to learn.
"""

import ast
import importlib.metadata
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

from benchmarks.quality.sentiment import Amounts, text_task
from benchmarks.texts import FILM_REVIEWS, LabeledText

LIBRARIES = {
    "matplotlib": "3.11.2",
    "networkx": "3.6.1",
    "pandas": "3.1.1",
    "scikit-learn": "1.9.1",
    "scipy": "1.17.1",
    "sympy": "1.14.0",
}
"""Their distributions, with versions: others have other texts."""
KEPT = Path("build/data/docstrings.json")
CODE = re.compile(
    r":\w+:`[^`]*`|`+[^`]*`+|\*\w+\*|\S*[_\\=()\[\]{}<>^|]\S*|\w*[a-z]+[A-Z]\w*|\w+\.\w\S*|[^a-zA-Z ,.;'-]"
)
NAMES = re.compile(r"matplotlib|pyplot|mpl|networkx|nx|pandas|pd|scikit-learn|scikit|sklearn|scipy|sympy|numpy", re.I)
FEWEST_WORDS, MOST_WORDS = 6, 60


def first_paragraphs(package: str) -> Iterator[str]:
    """Go through the first paragraphs of the docstrings of a package, as they are, in the order of its files."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    for file in sorted(root.rglob("*.py")):
        if not any("test" in part for part in file.relative_to(root).parts):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    yield (ast.get_docstring(node) or "").partition("\n\n")[0]


def without_names(text: str) -> str:
    """Leave out code and the names of libraries, and put the words that are left into one line."""
    return " ".join(word for word in CODE.sub(" ", text).split() if not NAMES.search(word))


class Docstrings:
    """A collection of labeled texts, such as `benchmarks.texts.Source`; a label is the number of a library."""

    num_classes = len(LIBRARIES)

    def read(self) -> list[LabeledText]:
        """Read all texts with some words left, as many of each library; of those with the same words only the first.

        Raises:
            FileNotFoundError: Where a library has another version.
        """
        for name, version in LIBRARIES.items():
            if (found := importlib.metadata.version(name)) != version:
                raise FileNotFoundError(f"docstrings are {name} {version}'s, not {found}'s: `LOCKED=1` installs it")
        if not KEPT.is_file():  # to parse all files takes as long as to train
            packages = [name.replace("scikit-learn", "sklearn") for name in LIBRARIES]
            texts = [[without_names(text) for text in first_paragraphs(package)] for package in packages]
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            KEPT.write_text(json.dumps(texts), encoding="utf-8")
        firsts: dict[str, LabeledText] = {}
        for row in zip_longest(*json.loads(KEPT.read_text(encoding="utf-8")), fillvalue=""):
            for label, text in enumerate(row):
                if FEWEST_WORDS <= len(text.split()) <= MOST_WORDS:
                    firsts.setdefault(text.lower(), LabeledText(text, label))
        by_label = [[each for each in firsts.values() if each.label == label] for label in range(self.num_classes)]
        return [each for row in zip(*by_label, strict=False) for each in row]


AMOUNTS = Amounts(training=384, test=300, validation=200, batch=16, epochs=1, is_head_fitted=False)
DOCSTRINGS_TASK = text_task("docstrings", Docstrings(), FILM_REVIEWS, AMOUNTS)
