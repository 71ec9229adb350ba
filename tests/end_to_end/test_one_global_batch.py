"""One global batch has one gradient, however it is cut into micro-batches, laid out, and divided over processes.

The gradients come out of whole runs of `train.py` (see `KEEP_GRADIENTS` in runs.py): dealing, collating, the scaling
of the loss, accumulation and the reduction over ranks are the trainer's own. Every part of the model is trained.
"""

import pytest

from mini_llava.training.checkpoint import read_manifest
from tests.end_to_end import runs
from tests.end_to_end.runs import CUTS, GLOBAL_BATCHES, WHOLE

# fp32 rounds at 6e-8; sums in another order over a few hundred tokens and five layers stay below 2e-6.
TOLERANCE = 1e-5
CUT_ON_ONE_PROCESS = [f"gradients-{cut}" for cut in CUTS if cut != WHOLE]
CUT_ON_TWO = runs.on_two_processes("gradients")


def disagreeing(found, expected) -> dict[str, float]:
    """Parameters whose gradients differ by more than the tolerance, and by how much, relative to the gradient."""
    assert found.keys() == expected.keys()
    differing = {}
    for name, gradient in expected.items():
        size = gradient.norm()
        if runs.is_rounding(name):  # held against that of the queries
            size = expected[name.replace("k_proj", "q_proj")].norm()
            assert gradient.norm() <= TOLERANCE * size
        difference = (found[name] - gradient).norm()
        if not difference <= TOLERANCE * size:
            differing[name] = float(difference / size)
    return differing


@pytest.fixture(scope="module")
def whole(one_process):
    return one_process(f"gradients-{WHOLE}")


def test_every_parameter_that_can_have_a_gradient_has_one(whole):
    gradients = runs.gradients(whole, "2-images-2-texts")
    manifest = read_manifest(whole / "checkpoint-1")
    assert gradients.keys() == manifest["parameters"].keys()
    assert {name.split(".")[0] for name in gradients} == {"vision_tower", "projector", "language_model"}
    without = [name for name, gradient in gradients.items() if not gradient.any() and not runs.is_rounding(name)]
    assert without == []


@pytest.mark.parametrize("batch", ["4-texts", "1-text"])
def test_without_images_the_gradient_of_projector_and_tower_is_zero_and_not_absent(whole, batch):
    gradients = runs.gradients(whole, batch)
    for name, gradient in gradients.items():
        assert gradient.any() == name.startswith("language_model"), name


@pytest.mark.parametrize("batch", GLOBAL_BATCHES)
@pytest.mark.parametrize("cut", CUT_ON_ONE_PROCESS)
def test_the_cut_into_micro_batches_changes_no_gradient(one_process, whole, cut, batch):
    assert disagreeing(runs.gradients(one_process(cut), batch), runs.gradients(whole, batch)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("batch", GLOBAL_BATCHES)
@pytest.mark.parametrize(("backend", "cut"), CUT_ON_TWO)
def test_two_processes_have_the_gradient_of_one(two_processes, whole, backend, cut, batch):
    assert disagreeing(runs.gradients(two_processes(backend, cut), batch), runs.gradients(whole, batch)) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "cut"), CUT_ON_TWO)
def test_two_processes_log_the_loss_and_the_gradient_norm_of_one(two_processes, whole, backend, cut):
    found, expected = runs.log(two_processes(backend, cut)), runs.log(whole)
    assert len(found) == len(GLOBAL_BATCHES)
    # The data have both modalities, but not every global batch has: None on both sides.
    for key in ("loss", "gradient_norm", "loss_by_modality/text", "loss_by_modality/image"):
        for line, other in zip(found, expected, strict=True):
            assert line.get(key) == (pytest.approx(other[key], rel=2e-6) if key in other else None), key
