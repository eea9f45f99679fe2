"""What users of transformers, accelerate and torch do with any model, and have seen fail with some."""

import copy

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from transformers import AutoModelForSequenceClassification as Auto
from transformers import BertForSequenceClassification

from tests.tiny import batch, build, quartered


@pytest.fixture(scope="module")
def student():
    return quartered(build(BertForSequenceClassification))


@pytest.fixture
def folder(student, tmp_path):
    student.save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_leaves_the_tables_as_they_were_saved(student, folder, device_map):
    """Stops buffers from being left uninitialised where weights are placed one by one, from several files."""
    found = Auto.from_pretrained(folder, device_map=device_map)
    assert torch.equal(found.bert.encoder.tables_LV, student.bert.encoder.tables_LV)
    torch.testing.assert_close(logits(found), logits(student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_a_dtype_is_that_of_weights_alone(student, folder, dtype):
    """Stops routing tables from being cast, in which large numbers of experts would be rounded."""
    found = Auto.from_pretrained(folder, dtype=dtype)
    assert found.bert.encoder.tables_LV.dtype == torch.int32
    assert (logits(found).float() - logits(student)).abs().max() < 0.1


def test_accelerate_offloads_and_dispatches(student, folder):
    """Stops weights that a hook brings for one call from being missed by what looks at them between calls."""
    offloaded = copy.deepcopy(student)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits(offloaded), logits(student))
    with init_empty_weights():
        empty = Auto.from_config(student.config)
    found = load_checkpoint_and_dispatch(empty, folder, device_map={"": "cpu"})
    torch.testing.assert_close(logits(found), logits(student))
