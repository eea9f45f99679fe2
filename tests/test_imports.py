"""What imports what: nobody waits for libraries that they do not use."""

import importlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import moebert_kernels
from moebert_kernels import models
from tests import forked
from tests.forked import BELOW_TRANSFORMERS
from tests.tiny import build_family, quartered

SLOW = ("transformers", "datasets", "sklearn", "scipy", "pandas", "matplotlib", "triton", "torch._dynamo")


def python(script, *arguments, imported=()):
    """What a new process prints."""
    strict = os.environ | {"PYTHONWARNINGS": "error::UserWarning:moebert_kernels"}
    run = forked.python("-c", script, *arguments, imported=imported, environment=strict)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_layer_alone_needs_torch_alone():
    """Stops users of the layer from waiting for transformers, ten of its families, scikit-learn and scipy.

    And for Triton, which waits for the first call on a GPU.
    """
    script = (
        "import sys, moebert_kernels\n"
        "assert 'torch' not in sys.modules\n"
        "from moebert_kernels import MoEFFN, RoutingPlan\n"
        f"print([name for name in {SLOW} if name in sys.modules])\n"
        "import torch\n"
        "ffn = MoEFFN(8, 8, 2, norm_eps=1e-12)\n"
        "plan = RoutingPlan.from_expert_ids(torch.tensor([0, 1, 1]), 2)\n"
        "print(tuple(ffn(torch.ones(3, 8), routing=plan).shape), 'transformers' in sys.modules)\n"
    )
    assert python(script).splitlines() == ["[]", "(3, 8) False"]


def test_help_comes_without_torch():
    """Stops `moebert --help`, and a mistyped option, from taking seconds."""
    script = (
        "import sys\n"
        "from moebert_kernels import cli\n"
        "from typer.testing import CliRunner\n"
        "for words in (['--help'], ['compress', '--help'], ['--version'], ['compress', '--epoch', '3']):\n"
        "    CliRunner().invoke(cli.app, words)\n"
        f"print([name for name in ('torch', *{SLOW}) if name in sys.modules])\n"
    )
    assert python(script) == "[]"


def test_a_student_loads_where_transformers_comes_first(tmp_path):
    """Stops README's way to load a student from working in one order alone, or importing every family."""
    quartered(build_family("Roberta")).save_pretrained(tmp_path)
    script = (
        "import sys, transformers.models.auto, moebert_kernels\n"
        "from transformers import AutoConfig, AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1])\n"
        "assert type(AutoConfig.from_pretrained(sys.argv[1])) is type(model.config)\n"
        "assert type(AutoConfig.for_model('moe-roberta', num_experts=2)) is type(model.config)\n"
        "print(type(model).__name__, 'transformers.models.mpnet.modeling_mpnet' in sys.modules)\n"
    )
    assert python(script, tmp_path, imported=BELOW_TRANSFORMERS) == "MoERobertaModel False"


def test_a_pickle_of_a_student_is_read_where_nothing_is_imported(tmp_path):
    """Stops classes that are made when asked for from being missed by pickle, as in a pool's workers."""
    torch.save(quartered(build_family("Bert", "ForSequenceClassification")), tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "from transformers import AutoModel\n"
        "print(type(model).__name__, type(AutoModel.from_config(model.config)).__name__)\n"
    )
    found = python(script, tmp_path / "model.pt", imported=BELOW_TRANSFORMERS)
    assert found.split() == ["MoEBertForSequenceClassification", "MoEBertModel"]


def test_a_student_loads_where_the_package_comes_first(tmp_path):
    quartered(build_family("Bert", "ForSequenceClassification")).save_pretrained(tmp_path)
    script = (
        "import sys, torch, moebert_kernels\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1])\n"
        "print(model(torch.arange(1, 9).view(2, 4)).logits.tolist())\n"
    )
    found = torch.tensor(json.loads(python(script, tmp_path, imported=BELOW_TRANSFORMERS)))
    expected = AutoModelForSequenceClassification.from_pretrained(tmp_path)(torch.arange(1, 9).view(2, 4))
    torch.testing.assert_close(found, expected.logits)


def test_a_transformers_that_is_strange_to_us_still_imports():
    """Stops our registration from breaking the import of another package."""
    script = (
        "import sys, warnings, moebert_kernels\n"
        "sys.modules['moebert_kernels.models.families'] = None\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        "    from transformers import AutoConfig\n"
        "print(AutoConfig.for_model('bert').model_type, any('moebert' in str(w.message) for w in told))\n"
    )
    assert python(script, imported=BELOW_TRANSFORMERS) == "bert True"


ROOMS = sorted(
    path.parent
    for path in Path(moebert_kernels.__file__).parent.rglob("__init__.py")
    if "exports(" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_name_is_there_and_a_type_checker_knows_the_same(room):
    """Stops a name from being exported and found nowhere, or imported for type checkers alone."""
    package = importlib.import_module(".".join(room.parts[room.parts.index("moebert_kernels") :]))
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        package.Nothing  # noqa: B018
    block = (room / "__init__.py").read_text(encoding="utf-8").partition("if TYPE_CHECKING:")[2]
    assert sorted(set(re.findall(r"\w+ as (\w+)", block))) == sorted(package.__all__)


def test_names_of_families_are_there():
    assert models.MoEMPNetForTokenClassification.__name__ == "MoEMPNetForTokenClassification"
    with pytest.raises(AttributeError, match="has no attribute 'MoENothing'"):
        models.MoENothing  # noqa: B018
    assert set(moebert_kernels.__all__) <= set(dir(moebert_kernels))
