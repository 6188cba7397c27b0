"""What reading a large file of PEFT's takes: the memory of one copy of the bases, however many the file holds.

Nor does it ask the system for more, which a mapped file may.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import RandLoraConfig, get_peft_model
from torch import nn

from tests.checkpoint_files import TENSORS_FILE
from tests.further import further

pytestmark = pytest.mark.medium

MEBIBYTE = 2**20
WIDTH, LAYERS, R = 1024, 48, 32

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from torch import nn
import randlora
from randlora.checkpoint.read import read_adapter

def kibibytes(name):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name + ":"))

small, large, what, width, layers = *sys.argv[1:4], *map(int, sys.argv[4:])

def run(directory, width):
    if what == "read":
        return read_adapter(Path(directory))
    model = nn.Sequential(nn.Linear(width, width), *(nn.Linear(8, 8) for _ in range(layers)))
    return model, randlora.load(model, directory)

run(small, 16)  # so that code which is used for the first time counts for nothing
before = kibibytes("VmRSS")
kept = run(large, width)
print(json.dumps({"peak": 1024 * (kibibytes("VmHWM") - before)}))
"""


def from_peft(directory: Path, width: int) -> Path:
    """Let PEFT write an adapter of one wide layer and many narrow ones, each with a copy of the wide one's bases."""
    model = nn.Sequential(nn.Linear(width, width), *(nn.Linear(8, 8) for _ in range(LAYERS)))
    names = [str(index) for index in range(LAYERS + 1)]
    get_peft_model(model, RandLoraConfig(r=R, target_modules=names)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return from_peft(tmp_path_factory.mktemp("small"), 16), from_peft(tmp_path_factory.mktemp("large"), WIDTH)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(("what", "copies"), [further("read", 2), ("load", 6)])
def test_a_file_of_200_megabytes_takes_the_memory_of_one_copy_of_its_bases(
    what: str, copies: int, directories: tuple[Path, Path]
) -> None:
    """Pages of mapped files count too. To load takes the model, the bases that are drawn to compare, and a chunk."""
    small, large = directories
    one_copy = 4 * (R * WIDTH + WIDTH * WIDTH)
    file = (large / TENSORS_FILE).stat().st_size
    assert file > max(200 * MEBIBYTE, LAYERS * one_copy)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, (small, large, what, WIDTH, LAYERS))],
        capture_output=True,
        text=True,
        check=True,
    )
    peak = json.loads(done.stdout)["peak"]
    assert peak < copies * one_copy + 6 * MEBIBYTE < file / 5


LIMITED = """
import resource, sys
import randlora

small, large, room = *sys.argv[1:3], int(sys.argv[3])
randlora.files.inspect(small)
with open("/proc/self/status") as status:
    used = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmData:"))
resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
print(randlora.files.inspect(large).storage)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux's")
def test_a_file_of_200_megabytes_is_inspected_where_there_is_room_for_half_of_it(
    directories: tuple[Path, Path],
) -> None:
    small, large = directories
    room = (large / TENSORS_FILE).stat().st_size // 2
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, (small, large, room))], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"stored {LAYERS + 2} times in the file\n"  # once for every layer, and once at the top
