"""The `csat_attention` section, module conversion and the op builder, the last two through the real DeepSpeed."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from csat_ext import convert
from csat_ext import deepspeed as integration
from csat_ext.config import CSATConfig
from csat_ext.deepspeed import CSATSection, apply, read_section
from csat_ext.module import CSATAttention


class Attention(nn.Module):
    """The smallest module with the four projections."""

    def __init__(self, width: int = 16, num_heads: int = 2, kv_dim: int | None = None, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = (nn.Linear(kv_dim or width, width) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.q_proj(x), self.k_proj(context), self.v_proj(context))
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleList(Attention() for _ in range(2))
        self.self_attn, self.cross_attn = Attention(causal=True), Attention(kv_dim=16)

    def forward(self, x: Tensor) -> Tensor:
        visual = x
        for attention in self.vision:
            visual = visual + attention(visual)
        return self.cross_attn(self.self_attn(x), visual).square().mean()


def section(**keys: Any) -> CSATSection:
    return read_section({"csat_attention": keys})


class _Sharded(Exception):
    pass


def test_the_device_is_chosen_before_the_ranks_compare_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL gathers objects on the current device, which is the first one on every rank until somebody chooses."""
    from deepspeed.accelerator import get_accelerator

    class MPU:
        @staticmethod
        def get_sequence_parallel_group() -> None: ...

    chosen: list[int] = []

    def shard(*_: Any) -> None:
        assert chosen == [3]
        raise _Sharded

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(type(get_accelerator()), "set_device", lambda _, device: chosen.append(device))
    monkeypatch.setattr(integration, "shard_sequence", shard)
    with pytest.raises(_Sharded):
        integration.initialize(model=Model(), config={"csat_attention": {"layers": "vision.*"}}, mpu=MPU)


# ---- the section -----------------------------------------------------------------------------------------------------


def test_every_key_arrives() -> None:
    read = section(layers="vision.*", threshold_lr_scale=3, measurements=8, anchors=["first"], decoder="linear")
    attention = CSATConfig(measurements=8, anchors=("first",), decoder="linear")
    assert read == CSATSection(True, "vision.*", threshold_lr_scale=3, attention=attention)


@pytest.mark.parametrize("config", [{}, {"csat_attention": {"enabled": False, "measurements": 8}}, {"bf16": {}}])
def test_without_an_enabled_section_nothing_changes(config: dict[str, Any]) -> None:
    model = Model()
    before = dict(model.named_modules())
    assert apply(model, read_section(config)) == []
    assert dict(model.named_modules()) == before


def test_a_section_is_enabled_unless_it_says_otherwise() -> None:
    assert section(measurements=8).enabled


@pytest.mark.parametrize(
    "key",
    ["csat_atention", "csat", "CSAT_attention", "csat-attention", "csat_attn", "compressed_sensing", "cs_attention"],
)
def test_near_misses_of_the_section_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"unknown section '{key}'; did you mean 'csat_attention'"):
        read_section({key: {"measurements": 8}})


@pytest.mark.parametrize(
    "key", ["sparse_attention", "activation_checkpointing", "data_efficiency", "zero_optimization"]
)
def test_sections_of_deepspeed_are_not_taken_for_ours(key: str) -> None:
    assert not read_section({key: {}}).enabled


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"measurments": 8}, ValueError, "csat_attention: unknown key 'measurments'; did you mean 'measurements'"),
        ({"layer_names": "*"}, ValueError, "unknown key 'layer_names'"),
        ({"enabled": "yes"}, TypeError, "csat_attention.enabled: 'yes' came, true or false is accepted"),
        ({"layers": ["*"]}, TypeError, "csat_attention.layers"),
        ({"types": "Attention"}, TypeError, "csat_attention.types: 'Attention' came, a list of class names"),
        ({"indices": 3}, TypeError, "csat_attention.indices: 3 came"),
        ({"indices": [True]}, TypeError, "csat_attention.indices"),
        ({"indices": "::0"}, TypeError, "csat_attention.indices"),
        ({"attention_dropout": "keep"}, TypeError, "csat_attention.attention_dropout: 'keep' came"),
        ({"hybrid": {}}, TypeError, "csat_attention.hybrid"),
        ({"hybrid": [{"layerz": "*"}]}, ValueError, r"hybrid\[0\]: unknown key 'layerz'"),
        ({"hybrid": [{"threshold_lr_scale": 2}]}, ValueError, r"hybrid\[0\]: unknown key 'threshold_lr_scale'"),
        (
            {"hybrid": [{"measurements": 0}]},
            ValueError,
            r"^csat_attention\.hybrid\[0\]: measurements must be at least 1",
        ),
        ({"hybrid": [{}, {"gain": 1}]}, TypeError, r"^csat_attention\.hybrid\[1\]: gain must be a bool"),
        ({"decoder": "auto"}, ValueError, "decoder: unknown value 'auto'"),
        ({"layers": "vision.*|"}, ValueError, "empty alternative"),
        ({"threshold_lr_scale": 0}, ValueError, "threshold_lr_scale: 0 came, a positive finite number is accepted"),
        ({"threshold_lr_scale": float("inf")}, ValueError, "threshold_lr_scale: inf came"),
        ({"measurements": 0}, ValueError, "measurements"),
        ({"measurements": "8"}, TypeError, "measurements"),
        ({"ensemble": "gausian"}, ValueError, "did you mean 'gaussian'"),
    ],
)
def test_wrong_keys_and_values_are_refused_by_name(keys: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        section(**keys)


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    with pytest.raises(FileNotFoundError, match="no file"):
        read_section(path)
    path.write_text("{,}")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_section(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"ds\.json is not valid JSON"):
        read_section(path)
    path.write_text('{"csat_attention": {"seed": 1}, "csat_attention": {"seed": 2}}')
    with pytest.raises(ValueError, match="'csat_attention' stands twice"):
        read_section(str(path))
    path.write_text("[]")
    with pytest.raises(TypeError, match="list came, a mapping is accepted"):
        read_section(path)
    with pytest.raises(TypeError, match="a mapping is accepted"):
        read_section({"csat_attention": True})


# ---- conversion ------------------------------------------------------------------------------------------------------


def test_apply_reuses_the_parameters_and_counts_the_layers() -> None:
    model = Model().eval()
    parameters = dict(model.named_parameters())
    replaced = apply(model, section(layers="vision.*|cross_attn", measurements=4, seed=5))
    assert replaced == ["vision.0", "vision.1", "cross_attn"]
    new = [model.get_submodule(name) for name in replaced]
    assert all(isinstance(module, CSATAttention) and not module.training for module in new)
    assert [module.config.layer for module in new] == [0, 1, 2]
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert isinstance(model.self_attn, Attention)


def test_apply_with_enough_measurements_computes_the_same() -> None:
    model, x = Model(), torch.randn(2, 9, 16)
    before = model(x)
    apply(model, section(layers="vision.*|cross_attn", measurements=9))
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("layers", ["visoin.*", "vision.*|cros_attn", "vision.0.q_proj"])
def test_a_pattern_that_matches_nothing_is_an_error(layers: str) -> None:
    with pytest.raises(ValueError, match=r"matches no attention module; this model has: vision\.0, vision\.1"):
        apply(Model(), section(layers=layers, measurements=4))


def layers_of(model: nn.Module) -> dict[str, int]:
    return {name: m.config.measurements for name, m in model.named_modules() if isinstance(m, CSATAttention)}


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"layers": "auto"}, ["vision.0", "vision.1", "cross_attn"]),
        ({"layers": "auto", "indices": [0, -1]}, ["vision.0", "cross_attn"]),
        ({"layers": "vision.*", "indices": "1:"}, ["vision.1"]),
        ({"layers": "auto", "indices": "::2"}, ["vision.0", "cross_attn"]),
        ({"layers": "auto", "types": ["Attention"]}, ["vision.0", "vision.1", "cross_attn"]),
        ({"layers": "auto", "types": ["csat_ext"], "indices": [1]}, ["vision.1"]),
    ],
)
def test_layers_are_chosen_by_name_type_and_index(keys: dict[str, Any], names: list[str]) -> None:
    model = Model()
    assert apply(model, section(measurements=4, **keys)) == names
    assert list(layers_of(model)) == names


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"types": ["CLIPAttention"]}, "types: no chosen attention module is a 'CLIPAttention'; there are: Attention"),
        ({"indices": [3]}, "indices: 3 came; there are 3 modules: vision.0, vision.1, cross_attn"),
        ({"indices": "5:"}, "indices: '5:' takes none of the 3 modules"),
        ({"hybrid": [{"layers": "text.*"}]}, r"hybrid\[0\].layers: 'text.\*' matches no attention module"),
        ({"hybrid": [{"enabled": False}]}, "hybrid: it leaves full attention in every chosen layer"),
    ],
)
def test_a_choice_of_nothing_is_refused_by_name(keys: dict[str, Any], message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        apply(model, section(layers="auto", measurements=4, **keys))
    assert not layers_of(model)


def test_hybrid_layers_have_settings_of_their_own() -> None:
    """The first entry that names a layer decides; what it does not say is inherited; the others follow the section."""
    hybrid = [
        {"indices": [0], "enabled": False},
        {"layers": "vision.*", "measurements": 6},
        {"layers": "*", "indices": [0], "measurements": 7},
    ]
    model = Model()
    keys = {"layers": "auto", "measurements": 4, "ensemble": "bucket", "seed": 3}
    assert apply(model, section(**keys, hybrid=hybrid)) == ["vision.1", "cross_attn"]
    assert layers_of(model) == {"vision.1": 6, "cross_attn": 4}
    config = model.get_submodule("vision.1").config
    assert (config.ensemble, config.seed, config.layer) == ("bucket", 3, 0)


def test_apply_takes_a_config_or_its_path(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"csat_attention": {"layers": "vision.1", "measurements": 4}}))
    assert apply(Model(), path) == apply(Model(), json.loads(path.read_text())) == ["vision.1"]


def test_causal_attention_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="chooses the causal self_attn; measurements mix the future into the past"):
        apply(Model(), section(layers="*_attn", measurements=4))


def test_a_causal_config_is_refused_where_modules_are_converted() -> None:
    with pytest.raises(ValueError, match=r"csat_attention\.causal: 'prefix' came"):
        apply(Model(), section(causal="prefix"))
    with pytest.raises(ValueError, match="causal = 'prefix' came, None is accepted"):
        convert.ConvertedTorchAttention(nn.MultiheadAttention(8, 2), CSATConfig(causal="prefix"))


@pytest.mark.parametrize("layers", ["a", "b", "*", "auto", "inner.*"])
def test_a_module_with_several_names_is_one_layer_replaced_under_all_of_them(layers: str) -> None:
    model = nn.ModuleDict({"a": Attention(), "other": nn.Linear(2, 2)})
    model["b"], model["inner"] = model["a"], nn.Sequential(model["a"])
    assert apply(model, section(layers=layers, indices=[0], measurements=4)) == ["a"]
    assert isinstance(model["a"], CSATAttention)
    assert model["a"] is model["b"] and model["a"] is model["inner"][0]


@pytest.mark.parametrize("layers", ["vision.*", "auto"])
def test_what_is_converted_already_or_the_root_is_said(layers: str) -> None:
    model = nn.ModuleDict({"vision": nn.ModuleList([Attention()])})
    apply(model, section(layers=layers, measurements=4))
    with pytest.raises(ValueError, match=r"matches no attention module.*; already converted: vision\.0"):
        apply(model, section(layers=layers, measurements=4))
    with pytest.raises(
        ValueError, match=r"the model itself is an attention module \(Attention\): pass the module that"
    ):
        apply(Attention(), section(layers=layers, measurements=4))
    with pytest.raises(ValueError, match="already converted: the model itself"):
        apply(model["vision"][0], section(layers=layers, measurements=4))


def test_a_refused_conversion_leaves_the_model_alone() -> None:
    model = Model()
    with pytest.raises(ValueError, match="causal"):
        apply(model, section(measurements=4))
    assert not any(isinstance(module, CSATAttention) for module in model.modules())


def test_projections_of_other_widths_are_refused() -> None:
    model = Model()
    model.vision[0].v_proj = nn.Linear(16, 8)
    with pytest.raises(ValueError, match="v_proj maps 16 features to 8; accepted: 16 to 16"):
        apply(model, section(layers="vision.0", measurements=4))


def test_a_registered_converter_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

    monkeypatch.setattr(convert, "_REGISTERED", {})
    integration.register_converter(Foreign, lambda module, config: CSATAttention(16, 2, config))
    model = nn.Sequential(Foreign())
    assert apply(model, section(measurements=4)) == ["0"]
    assert isinstance(model[0], CSATAttention)


def test_parameters_collected_before_the_conversion_are_refused() -> None:
    pytest.importorskip("deepspeed")
    model = Model()
    early = list(model.parameters())
    config = {"train_batch_size": 1, "csat_attention": {"layers": "vision.*", "measurements": 4}}
    with pytest.raises(ValueError, match=r"model_parameters lacks \d+ parameters .* such as vision\.0\."):
        integration.initialize(model=model, model_parameters=early, config=config)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer lacks"):
        integration.initialize(model=model, optimizer=optimizer, config=config)


class Reached(Exception):
    """DeepSpeed was called: what comes before has been passed."""


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that `deepspeed.initialize` was given, in whose place `Reached` is raised."""
    deepspeed, arguments = pytest.importorskip("deepspeed"), {}

    def initialize(**keys: Any) -> None:
        arguments.update(keys)
        raise Reached

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    return arguments


def config(scale: float | None = None, **params: Any) -> dict[str, Any]:
    own = {"layers": "vision.*", "measurements": 4} | ({} if scale is None else {"threshold_lr_scale": scale})
    return {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": params}, "csat_attention": own}


def hand_on(config: dict[str, Any], **arguments: Any) -> None:
    with pytest.raises(Reached):
        integration.initialize(config=config, **arguments)


def test_parameters_of_one_group_with_a_rate_of_the_thresholds_are_warned_of(handed_on: dict[str, Any]) -> None:
    told = "model_parameters: parameters of one group .*threshold_lr_scale = 3 has no effect .*; leave model_parameters"
    for params in (lambda m: m.parameters(), lambda m: [{"params": m.parameters()}]):
        model = Model()
        with pytest.warns(UserWarning, match=told):
            hand_on(config(3, lr=1e-3), model=model, model_parameters=params(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Model()
        hand_on(config(lr=1e-3), model=model, model_parameters=model.parameters())
        hand_on(config(3, lr=1e-3), model=(model := Model()), model_parameters=two_groups(model))
        hand_on(config(3, lr=1e-3), model=Model())


def two_groups(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Read after the replacement, as `model.parameters()` is."""
    for wanted in (True, False):
        yield {
            "params": [p for name, p in model.named_parameters() if name.endswith("threshold") == wanted],
            "lr": 1e-3,
        }


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", ["auto", None])
def test_a_rate_that_is_no_number_is_refused_by_name(key: str, value: Any) -> None:
    pytest.importorskip("deepspeed")
    for collected in (None, [nn.Parameter(torch.ones(1))]):
        model = Model()
        with pytest.raises(ValueError, match=rf"optimizer\.params\.{key}: {value!r} came, a number is accepted"):
            integration.initialize(model=model, config=config(**{"lr": 1e-3, key: value}), model_parameters=collected)
        assert not layers_of(model)


@pytest.mark.parametrize(("kind", "rate"), [("AdamW", 1e-3), ("Adagrad", 1e-2), ("Lion", 1e-3), ("RMSprop", 1e-2)])
@pytest.mark.parametrize("params", [{}, None])
def test_an_optimizer_without_a_rate_has_its_default_in_every_group(
    handed_on: dict[str, Any], kind: str, rate: float, params: dict[str, Any] | None
) -> None:
    keys = config(3)
    keys["optimizer"] = {"type": kind} if params is None else {"type": kind, "params": params}
    hand_on(keys, model=Model())
    rates = {group["name"]: group["lr"] for group in handed_on["model_parameters"]}
    assert rates == pytest.approx({"decay": rate, "no_decay": rate, "threshold": 3 * rate})


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": None}, {"optimizer": {"type": "Muon"}}])
def test_without_a_known_rate_the_parameters_are_handed_on_plain(
    handed_on: dict[str, Any], optimizer: dict[str, Any]
) -> None:
    keys = config()
    del keys["optimizer"]
    model = Model()
    hand_on(keys | optimizer, model=model)
    assert [id(p) for p in handed_on["model_parameters"]] == [id(p) for p in model.parameters()]


def test_the_default_rates_are_those_of_the_installed_deepspeed() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.ops import adagrad, adam, lamb, lion

    kinds = {
        "adam": (adam.FusedAdam, adam.DeepSpeedCPUAdam, torch.optim.Adam),
        "adamw": (adam.FusedAdam, adam.DeepSpeedCPUAdam, torch.optim.AdamW),
        "adagrad": (adagrad.DeepSpeedCPUAdagrad, torch.optim.Adagrad),
        "lamb": (lamb.FusedLamb,),
        "lion": (lion.FusedLion, lion.DeepSpeedCPULion),
    }
    found = {name: {inspect.signature(kind).parameters["lr"].default for kind in kinds[name]} for name in kinds}
    assert found == {name: {rate} for name, rate in integration._DEFAULT_RATES.items()}


@pytest.mark.parametrize(("argument", "keys"), [("model", {"config": {}}), ("config", {"model": nn.Linear(1, 1)})])
def test_initialize_names_what_is_missing(argument: str, keys: dict[str, Any]) -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(TypeError, match=f"{argument}: None came"):
        integration.initialize(**keys)


# ---- the op builder --------------------------------------------------------------------------------------------------

FACTS = """
import json
import torch
from csat_ext import deepspeed as integration
assert not torch.cuda.is_initialized()
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.all_ops import ALL_OPS

integration.register()
builder = get_accelerator().create_op_builder("CSATAttentionBuilder")
other = get_accelerator().create_op_builder("NoSuchBuilder")
print(json.dumps({
    "listed": [name for name, op in ALL_OPS.items() if name == "csat_attention" and op.is_compatible()],
    "loaded": builder.load().__name__,
    "same": type(builder) is type(ALL_OPS["csat_attention"]),
    "other": None if other is None else type(other).__name__,
}))
"""


def in_process(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    search = [*map(str, path), *(p for p in sys.path if p)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(search)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)


def test_importing_registers_the_builder_once() -> None:
    """A second `register` changes nothing, and no CUDA context is made."""
    pytest.importorskip("deepspeed")
    done = in_process(FACTS)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts.pop("other") in (None, "NotImplementedBuilder")
    assert facts == {"listed": ["csat_attention"], "loaded": "csat_ext._C", "same": True}


@pytest.fixture
def never_built(tmp_path: Path) -> Path:
    """A checkout without the compiled library, whose `setup.py` puts it there instead of compiling it."""
    package = Path(convert.__file__).parent
    ignored = shutil.ignore_patterns("_C*.so", "_cuda*.so", "__pycache__", "pretrain")
    shutil.copytree(package, tmp_path / "python" / "csat_ext", ignore=ignored)
    library = importlib.util.find_spec("csat_ext._C")
    assert library is not None and library.origin is not None
    copying = f"shutil.copy({library.origin!r}, 'python/csat_ext'); open('built', 'a').write('once ')"
    checked = "assert sys.argv[1:] == ['build_ext', '--inplace']"
    (tmp_path / "setup.py").write_text(f"import shutil, sys; {checked}; {copying}")
    return tmp_path


LOAD = "from csat_ext import op_builder; print(op_builder.load().__file__)"


def test_the_library_is_built_where_a_checkout_has_none(never_built: Path) -> None:
    for _ in range(2):  # the second process finds it
        done = in_process(LOAD, never_built / "python")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(never_built))
    assert (never_built / "built").read_text() == "once "


def test_what_cannot_be_built_or_loaded_says_so(never_built: Path) -> None:
    (never_built / "setup.py").write_text("raise SystemExit('no compiler')")
    assert "could not be built" in (told := in_process(LOAD, never_built / "python").stderr) and "no compiler" in told
    (never_built / "setup.py").unlink()
    assert "its sources are not here: reinstall csat_ext" in in_process(LOAD, never_built / "python").stderr
    (never_built / "python" / "csat_ext" / "_C.abi3.so").write_bytes(b"not a library")
    assert "csat_ext._C could not be loaded" in in_process(LOAD, never_built / "python").stderr


def test_an_attention_called_otherwise_is_not_taken_for_ours() -> None:
    """The same four projections under another forward signature would fail at the first call, not here."""

    class Foreign(Attention):
        def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(hidden_states)

    model = nn.ModuleDict({"attn": Foreign(8)})
    with pytest.raises(ValueError, match="matches no attention module; this model has: none"):
        apply(model, section(layers="*"))


def test_a_hybrid_entry_may_number_its_layers_itself() -> None:
    model, hybrid = Model(), [{"layers": "vision.1", "layer": 100}]
    apply(model, section(layers="vision.*|cross_attn", measurements=4, layer=7, hybrid=hybrid))
    assert [model.get_submodule(name).config.layer for name in ("vision.0", "vision.1", "cross_attn")] == [7, 101, 9]
