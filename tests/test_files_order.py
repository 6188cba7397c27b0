"""Names sort as models define them: numbers by their size, parts of a layer in the order in which they run."""

from hypothesis import given
from hypothesis import strategies as st

from randlora.files.order import model_order


@given(numbers=st.lists(st.integers(0, 200), unique=True))
def test_layers_come_in_the_order_of_their_numbers(numbers: list[int]) -> None:
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in numbers]
    assert sorted(names, key=model_order) == [f"model.layers.{n}.mlp.up_proj.weight" for n in sorted(numbers)]


@given(names=st.permutations(["q_proj", "k_proj", "v_proj", "o_proj"]))
def test_the_parts_of_an_attention_come_as_they_run(names: list[str]) -> None:
    assert sorted(names, key=model_order) == ["q_proj", "k_proj", "v_proj", "o_proj"]


@given(st.lists(st.text("ab.01²", min_size=1), max_size=8))
def test_any_names_can_be_sorted(names: list[str]) -> None:
    assert sorted(sorted(names, key=model_order)) == sorted(names)
