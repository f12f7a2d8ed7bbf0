"""Conversion of foreign attention: with as many measurements as tokens the model computes what it computed before."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from csat_ext.convert import key_mask
from csat_ext.deepspeed import apply, register_converter
from csat_ext.module import CSATAttention, CSATCore

B, N, E, H = 2, 12, 16, 2


def converted(model: nn.Module, **keys: Any) -> list[str]:
    return apply(model, {"csat_attention": {"measurements": N * 4, **keys}})


class _Stub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A torchvision that holds nothing: timm imports it, for image transforms, before anything of its own."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("torchvision") else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return MagicMock(spec=None, __path__=[], __spec__=spec, __name__=spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@pytest.fixture(scope="module")
def timm() -> Any:
    """timm, installed without torchvision where only a build for another torch is to be had."""
    if importlib.util.find_spec("torchvision") is not None:
        return pytest.importorskip("timm")
    stub = _Stub()
    sys.meta_path.insert(0, stub)
    try:
        return pytest.importorskip("timm")
    finally:
        sys.meta_path.remove(stub)
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    return pytest.importorskip("transformers")


def assert_same_function(
    model: nn.Module, call: Callable[[nn.Module], Tensor], layers: str, count: int, **keys: Any
) -> None:
    """Converts `layers` of the model in place: the parameters stay the same objects under the same names, and output
    and gradients are those of before."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():  # no zeros, on which a layer norm is anything
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    before = call(model)
    probe = torch.randn(before.shape, generator=generator)
    wanted = torch.autograd.grad(before, list(parameters.values()), probe, allow_unused=True)
    replaced = converted(model, layers=layers, **keys)
    assert len(replaced) == count
    assert all(isinstance(model.get_submodule(name), CSATCore) for name in replaced)
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    after = call(model)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(after, list(parameters.values()), probe, allow_unused=True)
    for name, new, old in zip(parameters, got, wanted, strict=True):
        assert (new is None) == (old is None), name
        if new is not None:
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# ---- masks -----------------------------------------------------------------------------------------------------------

KEEP = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 5])
def test_masks_that_are_the_same_for_every_query_become_key_masks(queries: int, dtype: torch.dtype) -> None:
    wide = KEEP[:, None, None].expand(2, 1, queries, 3)
    mask = wide if dtype == torch.bool else torch.where(wide, 0.0, torch.finfo(dtype).min).to(dtype)
    assert key_mask("mask", mask, 2, 3).equal(KEEP)
    assert key_mask("mask", mask.clone(), 2, 3).equal(KEEP)
    if dtype == torch.bool:
        assert key_mask("mask", ~mask, 2, 3, true_keeps=False).equal(KEEP)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 3, dtype=torch.bool).tril(), "differs between queries, as a causal mask does"),
        (torch.full((3, 3), -torch.inf).triu(1), "differs between queries"),
        (torch.arange(6.0).reshape(1, 2, 1, 3), "differs between heads"),
        (torch.linspace(-1, 0, 3), "holds scores to be added"),
        (torch.ones(2, 1, 1, 4, dtype=torch.bool), r"accepted: broadcastable to .* tokens = 3"),
        (torch.ones(3, 1, 1, 3, dtype=torch.bool), "batch = 2"),
    ],
)
def test_masks_that_are_not_key_masks_are_refused_by_name(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"attn_mask.*{message}"):
        key_mask("attn_mask", mask, 2, 3)


# ---- torch.nn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 8, "vdim": 6}])
@pytest.mark.parametrize("masked", [False, True])
def test_torch_multihead_attention(options: dict[str, Any], batch_first: bool, masked: bool) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, H, batch_first=batch_first, **options)})
    query, key, value = torch.randn(B, 5, E), torch.randn(B, N, options.get("kdim", E)), torch.randn(B, N, E)
    value = value[..., : options.get("vdim", E)]
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[0, 7:] = masked
    if not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))

    def call(model: nn.Module) -> Tensor:
        return model["attn"](query, key, value, key_padding_mask=padding, need_weights=False)[0]  # type: ignore[index]

    assert_same_function(model, call, "attn", 1)


def test_torch_self_attention_without_a_batch_and_with_a_shared_mask() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, H)})
    x, mask = torch.randn(N, E), torch.zeros(N, N).index_fill(1, torch.tensor([3, 4]), -torch.inf)
    assert_same_function(model, lambda m: m["attn"](x, x, x, attn_mask=mask, need_weights=False)[0], "*", 1)  # type: ignore[index]


@pytest.mark.parametrize("padded", [False, True])
def test_torch_encoder_layers_take_no_dense_path_in_evaluation(padded: bool) -> None:
    """`nn.TransformerEncoder` has a fused inference path that reads in_proj_weight and never calls its attention."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(B, N, E)
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[1, 9:] = padded
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        converted(model, layers="layers.*")
        kept = ~padding
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], before[kept], rtol=1e-4, atol=1e-5)
        model.layers[0].self_attn.gain.fill_(3.0)  # a dense path would not notice
        assert not torch.allclose(model(x, src_key_padding_mask=padding)[kept], before[kept], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"add_bias_kv": True}, r"layers: attn \(MultiheadAttention\): bias_k is set"),
        ({"add_zero_attn": True}, "add_zero_attn is True"),
        ({"dropout": 0.1}, "attention_dropout: attn drops attention probabilities out at rate 0.1"),
    ],
)
def test_what_torch_attention_adds_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, H, **options)})
    with pytest.raises(ValueError, match=message):
        converted(model)
    assert isinstance(model["attn"], nn.MultiheadAttention)


def test_masks_are_checked_in_a_compiled_graph() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, H, batch_first=True)})
    converted(model, measurements=5)
    x, mask = torch.randn(B, N, E), torch.zeros(N, N, dtype=torch.bool).index_fill(1, torch.tensor(3), True)

    def call(mask: Tensor) -> Tensor:
        return model["attn"](x, x, x, attn_mask=mask, need_weights=False)[0]

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(mask), call(mask))
    with pytest.raises(RuntimeError, match="attn_mask differs between queries"):
        compiled(torch.ones(N, N, dtype=torch.bool).triu(1))


def test_torch_calls_that_are_refused_or_warned_of() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, H, dropout=0.1)})
    assert converted(model, attention_dropout="omit") == ["attn"]
    x = torch.randn(N, B, E)
    with pytest.raises(ValueError, match="is_causal=True came"):
        model["attn"](x, x, x, is_causal=True, need_weights=False)
    with pytest.raises(ValueError, match="attn_mask differs between queries"):
        mask = torch.ones(N, N, dtype=torch.bool).triu(1)
        model["attn"](x, x, x, attn_mask=mask, need_weights=False)
    with pytest.warns(UserWarning, match="need_weights=True"):
        assert model["attn"](x, x, x)[1] is None


# ---- grouped queries -------------------------------------------------------------------------------------------------


class Grouped(nn.Module):
    """Grouped-query attention with the signature of ours."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.num_heads, width = 4, kv_heads * 4
        self.q_proj, self.out_proj = nn.Linear(E, E), nn.Linear(E, E)
        self.k_proj, self.v_proj = nn.Linear(E, width), nn.Linear(E, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries(kv_heads: int) -> None:
    x = torch.randn(B, N, E)
    assert_same_function(nn.Sequential(Grouped(kv_heads)), lambda model: model(x), "0", 1)


@pytest.mark.parametrize(
    "keys", [{}, {"learned": True, "length": N}, {"feature_rank": 2}, {"decoder": "linear"}, {"gain": False}]
)
def test_grouped_queries_compressed(keys: dict[str, Any]) -> None:
    """Every key head has its measurements, and they give what repeated keys and values would."""
    model, x = nn.Sequential(Grouped(2)), torch.randn(B, N, E)
    converted(model, measurements=5, head_shift=False, **keys)
    module = model[0]
    assert isinstance(module, CSATAttention) and module.kv_heads == 2
    q, k, v = (module._heads(p(x)) for p in (module.q_proj, module.k_proj, module.v_proj))
    wide = CSATCore(4, 4, module.config)
    state = module.state_dict()
    for name in ("phi", "score_bias"):
        if name in state:
            state[name] = state[name].repeat_interleave(2, dim=0)
    wide.load_state_dict({name: state[name] for name in wide.state_dict()})
    repeated = (t.repeat_interleave(2, dim=1) for t in (k, v))
    torch.testing.assert_close(module.attend(q, k, v), wide.attend(q, *repeated), rtol=1e-4, atol=1e-5)


class Normed(Grouped):
    """What a module may compute beside its projections."""

    def __init__(self, **extras: Any) -> None:
        super().__init__(4)
        for name, value in extras.items():
            self.register_buffer(name, value) if type(value) is Tensor else setattr(self, name, value)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        (
            {"q_norm": nn.LayerNorm(4), "k_norm": nn.LayerNorm(4)},
            r"it holds q_norm \(LayerNorm\), k_norm \(LayerNorm\)",
        ),
        ({"resid_drop": nn.Dropout(0.1)}, r"it holds resid_drop \(Dropout\) beside its projections"),
        ({"attn_drop": nn.Linear(2, 2)}, r"it holds attn_drop \(Linear\)"),
        ({"temperature": nn.Parameter(torch.ones(()))}, r"it holds temperature \(parameter\)"),
        ({"bias": torch.ones(N, N)}, r"it holds bias \(buffer\)"),
        ({"scale": 1.0}, r"the scale of its scores is 1\.0; accepted: 1 / sqrt\(4\)"),
        ({"scaling": 0.25, "scale": 0.5}, r"the scale of its scores is 0\.25; accepted"),
        ({"scale": "auto"}, r"the scale of its scores is auto"),
    ],
)
def test_what_stands_beside_the_projections_is_refused_by_name(extras: dict[str, Any], message: str) -> None:
    model = nn.Sequential(Normed(**extras))
    with pytest.raises(ValueError, match=rf"layers: 0 \(Normed\): {message}"):
        converted(model)
    assert isinstance(model[0], Normed)


def test_what_does_nothing_beside_the_projections_is_taken() -> None:
    idle = {"q_norm": nn.Identity(), "resid_drop": nn.Dropout(0.0), "attn_drop": nn.Dropout(0.0), "dropout": 0.0}
    x = torch.randn(B, N, E)
    assert_same_function(nn.Sequential(Normed(**idle, scale=0.5, scaling=None)), lambda model: model(x), "0", 1)


def test_every_dropout_of_attention_probabilities_counts() -> None:
    model = nn.Sequential(Normed(attn_drop=nn.Dropout(0.0), dropout=0.3))
    with pytest.raises(ValueError, match=r"0 drops attention probabilities out at rate 0\.3"):
        converted(model)
    assert converted(model, attention_dropout="omit") == ["0"]


# ---- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "norm_layer": nn.LayerNorm}, {"init_values": 0.1}])
def test_timm_vit(timm: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": E, "depth": 2, "num_heads": H, "num_classes": 3}
    model = timm.models.VisionTransformer(**sizes, **options)
    assert_same_function(model, lambda m: m(IMAGES), "blocks.*.attn", 2, types=["timm"])


@pytest.mark.parametrize(
    "options", [{"gated": True}, {"scale_norm": True, "norm_layer": nn.LayerNorm}, {"qkv_bias": True, "dim_out": 8}]
)
def test_timm_attention_variants(timm: Any, options: dict[str, Any]) -> None:
    model, x = nn.Sequential(timm.layers.Attention(E, H, **options)), torch.randn(B, N, E)
    mask = torch.ones(B, 1, N, N, dtype=torch.bool)
    mask[1, ..., 5:] = False
    assert_same_function(model, lambda m: m[0](x, attn_mask=mask), "0", 1)  # type: ignore[operator]


def test_timm_dropout_is_carried_over_or_refused(timm: Any) -> None:
    model = nn.Sequential(timm.layers.Attention(E, H, attn_drop=0.2, proj_drop=0.5))
    with pytest.raises(ValueError, match=r"0 drops attention probabilities out at rate 0\.2"):
        converted(model)
    converted(model, attention_dropout="omit")
    x = torch.randn(B, N, E)
    assert 0.3 < float((model(x) == 0).double().mean()) < 0.7
    with pytest.raises(ValueError, match="is_causal=True came"):
        model[0](x, is_causal=True)


# ---- transformers ----------------------------------------------------------------------------------------------------

IMAGES = torch.randn(B, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(5, 40, (B, N), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones(B, N, dtype=torch.int64).index_put((torch.tensor([1, 1]), torch.tensor([10, 11])), torch.tensor(0))
SIZES = {"hidden_size": E, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": H}
VISION = {**SIZES, "image_size": 16, "patch_size": 4}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0}


def image_model(hugging_face: Any, name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(hugging_face, f"{name}Config")(**VISION)
    return getattr(hugging_face, f"{name}Model")(config)


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2", "CLIPVision", "SiglipVision", "BlipVision", "Blip2Vision"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_image_towers(hugging_face: Any, name: str, implementation: str) -> None:
    model = image_model(hugging_face, name)
    model.set_attn_implementation(implementation if name != "BlipVision" else "eager")

    def call(model: nn.Module) -> Tensor:
        return model(pixel_values=IMAGES).last_hidden_state

    assert_same_function(model, call, "*", 2, types=["transformers"])


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_text_encoders(hugging_face: Any, name: str, padded: bool, implementation: str) -> None:
    torch.manual_seed(0)
    config = getattr(hugging_face, f"{name}Config")(**TEXT, attention_probs_dropout_prob=0.0, pad_token_id=0)
    model = getattr(hugging_face, f"{name}Model")(config)
    model.set_attn_implementation(implementation)
    mask = PADDING if padded else None

    def call(model: nn.Module) -> Tensor:
        rows = model(input_ids=TOKENS, attention_mask=mask).last_hidden_state
        return rows if mask is None else rows * mask[..., None]

    assert_same_function(model, call, "*.attention.self", 2)


def test_transformers_bert_drops_attention_out_by_default(hugging_face: Any) -> None:
    model = hugging_face.BertModel(hugging_face.BertConfig(**TEXT))
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.attention\.self drops .* at rate 0\.1"):
        converted(model)
    assert len(converted(model, attention_dropout="omit")) == 2


def test_transformers_cross_attention_of_a_bert_decoder(hugging_face: Any) -> None:
    config = hugging_face.BertConfig(
        **TEXT, attention_probs_dropout_prob=0.0, is_decoder=True, add_cross_attention=True, use_cache=False
    )
    model, visual = hugging_face.BertModel(config), torch.randn(B, 7, E)
    with pytest.raises(ValueError, match=r"the causal encoder\.layer\.0\.attention\.self"):
        converted(model)

    def call(model: nn.Module) -> Tensor:
        return model(
            input_ids=TOKENS, encoder_hidden_states=visual, encoder_attention_mask=PADDING[:, -7:]
        ).last_hidden_state

    assert_same_function(model, call, "auto", 2, types=["BertCrossAttention"])


def blip(hugging_face: Any) -> nn.Module:
    torch.manual_seed(0)
    text = {**TEXT, "attention_probs_dropout_prob": 0.0, "encoder_hidden_size": E, "projection_dim": 8}
    special = {"bos_token_id": 1, "sep_token_id": 2, "pad_token_id": 0, "eos_token_id": 2}
    config = hugging_face.BlipConfig(text_config={**text, **special}, vision_config=VISION, projection_dim=8)
    return hugging_face.BlipForConditionalGeneration(config)


def test_transformers_blip_captioning(hugging_face: Any) -> None:
    """The image tower and the cross-attention; the causal self-attention between them stays what it was."""

    def call(model: nn.Module) -> Tensor:
        return model(pixel_values=IMAGES, input_ids=TOKENS, labels=TOKENS, attention_mask=PADDING).logits

    assert_same_function(blip(hugging_face), call, "vision_model.*|*.crossattention.self", 4)


def test_transformers_blip_generates_through_compressed_cross_attention(hugging_face: Any) -> None:
    model = blip(hugging_face).eval()
    options = {"pixel_values": IMAGES, "max_new_tokens": 4, "do_sample": False}
    before = model.generate(**options)
    converted(model, layers="vision_model.*|*.crossattention.self")
    assert model.generate(**options).equal(before)


def test_transformers_auto_leaves_blip_a_decoder_that_generates(hugging_face: Any) -> None:
    model = blip(hugging_face).eval()
    options = {"pixel_values": IMAGES, "max_new_tokens": 4, "do_sample": False}
    before = model.generate(**options)
    replaced = converted(model, layers="auto")
    assert len(replaced) == 4 and not any(".attention.self" in name for name in replaced)
    assert model.generate(**options).equal(before)
    decoder = blip(hugging_face).text_decoder
    assert converted(decoder, layers="auto") == [f"bert.encoder.layer.{i}.crossattention.self" for i in range(2)]


def test_transformers_auto_takes_the_text_encoder_of_blip(hugging_face: Any) -> None:
    """Its config says `is_decoder` too, and yet it is called without a causal mask."""
    text = {**TEXT, "attention_probs_dropout_prob": 0.0, "encoder_hidden_size": E, "is_decoder": True}
    model = hugging_face.BlipTextModel(hugging_face.BlipTextConfig(**text)).eval()

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=TOKENS, attention_mask=PADDING).last_hidden_state * PADDING[..., None]

    assert_same_function(model, call, "auto", 4)


def test_transformers_causal_text_is_refused(hugging_face: Any) -> None:
    """By the config or the model around it where they tell (CLIP's text tower, BLIP's decoder), and by the mask where
    only the call does."""
    text = {**TEXT, "eos_token_id": 2}
    del text["hidden_dropout_prob"]
    model = hugging_face.CLIPModel(hugging_face.CLIPConfig(text_config=text, vision_config=VISION))
    with pytest.raises(ValueError, match=r"the causal text_model\.(encoder\.)?layers\.0\.self_attn"):
        converted(model)
    assert len(converted(model, layers="auto")) == 2
    captioner = blip(hugging_face)
    with pytest.raises(ValueError, match=r"the causal text_decoder\.bert\.encoder\.layer\.0\.attention\.self, "):
        converted(captioner, layers="text_decoder.*.attention.self")
    converted(captioner.text_decoder.bert, layers="*.attention.self")  # the model that says so is not seen
    with pytest.raises(ValueError, match="attention_mask differs between queries, as a causal mask does"):
        captioner(pixel_values=IMAGES, input_ids=TOKENS, labels=TOKENS)


def test_transformers_keywords_that_cannot_be_honoured_are_refused(hugging_face: Any) -> None:
    model = image_model(hugging_face, "ViT")
    name = converted(model)[0]
    attention, x = model.get_submodule(name), torch.randn(B, N, E)
    for keywords in ({"is_causal": True}, {"output_attentions": True}, {"position_bias": torch.zeros(1, H, N, N)}):
        with pytest.raises(ValueError, match=f"{next(iter(keywords))} came .*compressed attention cannot honour it"):
            attention(x, **keywords)
    with pytest.raises(ValueError, match="cache came"):
        attention(x, cache=object())


def test_a_subclass_is_not_taken_for_its_parent(hugging_face: Any) -> None:
    from transformers.models.vit.modeling_vit import ViTAttention

    class Rotary(ViTAttention):
        pass

    model = nn.ModuleDict({"attn": Rotary(hugging_face.ViTConfig(**VISION))})
    with pytest.raises(ValueError, match="this model has: none"):
        converted(model)


def test_conversion_of_models_imports_no_framework() -> None:
    import subprocess

    check = (
        "import sys, torch; from csat_ext.convert import family; family(torch.nn.MultiheadAttention(4, 2));"
        "sys.exit(int(not {'timm', 'transformers'}.isdisjoint(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], env={"PYTHONPATH": ":".join(p for p in sys.path if p)})
    assert done.returncode == 0


# ---- "auto" and other dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "extra"), [("ViT", 1), ("CLIPVision", 1), ("SiglipVision", 0), ("DeiT", 2)])
def test_auto_takes_the_image_layout_from_transformers(hugging_face: Any, name: str, extra: int) -> None:
    model = image_model(hugging_face, name)
    converted(model, measurements="auto", grid="auto", anchors="auto")
    config = next(m for m in model.modules() if isinstance(m, CSATCore)).config
    assert (config.grid, config.measurements, len(config.anchors)) == ((4, 4), 4 + extra, extra)
    assert bool(model(pixel_values=IMAGES).last_hidden_state.isfinite().all())


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("partitioned", [False, True])
def test_auto_counts_the_tokens_of_one_parameter(hugging_face: Any, registers: int, partitioned: bool) -> None:
    config = hugging_face.Dinov2WithRegistersConfig(**VISION, num_register_tokens=registers)
    model = hugging_face.Dinov2WithRegistersModel(config)
    if partitioned:  # as ZeRO-3 leaves parameters
        for parameter in model.embeddings.parameters(recurse=False):
            parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    converted(model, measurements="auto", grid="auto", anchors="auto")
    layer = next(m for m in model.modules() if isinstance(m, CSATCore)).config
    anchors = (0, 1, 2, 3) if registers else ("first",)
    assert (layer.grid, layer.measurements, layer.anchors) == ((4, 4), 5 + registers, anchors)
    assert partitioned or bool(model(pixel_values=IMAGES).last_hidden_state.isfinite().all())


def test_auto_takes_the_image_layout_from_timm(timm: Any) -> None:
    sizes = {"img_size": (24, 16), "patch_size": 4, "embed_dim": E, "depth": 1, "num_heads": H}
    model = timm.models.VisionTransformer(**sizes, reg_tokens=2)
    converted(model, measurements="auto", grid="auto", anchors="auto")
    config = model.blocks[0].attn.config
    assert (config.grid, config.measurements, config.anchors) == ((6, 4), 9, (0, 1, 2))
    assert bool(model(torch.randn(B, 3, 24, 16)).isfinite().all())


def test_auto_that_nothing_answers_is_refused() -> None:
    with pytest.raises(ValueError, match='grid: "auto" needs the image and patch size of 0'):
        converted(nn.Sequential(nn.MultiheadAttention(E, H)), grid="auto")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_replacement_has_the_dtype_of_the_replaced(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.MultiheadAttention(E, H, batch_first=True)).to(dtype)
    x = torch.randn(B, N, E, dtype=dtype)
    before = model[0](x, x, x, need_weights=False)[0]
    converted(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    after = model[0](x, x, x, need_weights=False)[0]
    torch.testing.assert_close(
        after, before, rtol=1e-9 if dtype == torch.float64 else 2e-2, atol=1e-2 * (dtype == torch.bfloat16)
    )


def test_a_registered_converter_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csat_ext.convert._REGISTERED", {})
    register_converter(nn.MultiheadAttention, lambda module, config: CSATAttention(E, H, config))
    model = nn.Sequential(nn.MultiheadAttention(E, H))
    converted(model)
    assert isinstance(model[0], CSATAttention)


def test_torch_masks_of_every_batch_element_and_head() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, H, batch_first=True)})
    x, mask = torch.randn(B, N, E), torch.zeros(B, H, N, N, dtype=torch.bool)
    mask[0, :, :, 7:] = True
    assert_same_function(
        model,
        lambda m: m["attn"](x, x, x, attn_mask=mask.flatten(0, 1), need_weights=False)[0],  # type: ignore[index]
        "attn",
        1,
    )
