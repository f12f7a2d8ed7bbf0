"""Every ensemble: scale, columns that depend on their position alone, pools in 1-D to 3-D, anchors, masks, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csat_ext.measurements import ENSEMBLES, cell_grid, measurement, measurement_matrix

F64 = torch.float64
AVERAGING = sorted(name for name, ensemble in ENSEMBLES.items() if ensemble.averaging)
SIGNED = sorted(set(ENSEMBLES) - set(AVERAGING))
RANDOM_SIGNED = ["count_sketch", "gaussian", "rademacher", "srht"]
POOLS = ["learned", "pool"]


def test_the_registry():
    assert AVERAGING == ["bucket", "learned", "pool"]
    assert SIGNED == ["count_sketch", "dct", "gaussian", "haar", "rademacher", "srht"]
    for ensemble in ENSEMBLES.values():
        assert len(ensemble.summary) > 60
        assert ensemble.options == (frozenset({"grid", "head_shift"}) if ensemble.name in POOLS else frozenset())


# --- scale ---


@pytest.mark.parametrize("ensemble", SIGNED)
@pytest.mark.parametrize("n", [64, 100])
def test_signed_entries_have_variance_one_over_n(ensemble, n):
    phi = measurement_matrix(ensemble, 48, n, seed=3, heads=32, dtype=F64)
    variance = n * (phi**2).mean()
    # All but gaussian have it exactly, over an entry, a row or a column.
    tolerance = 5 * math.sqrt(2 / phi.numel()) if ensemble == "gaussian" else 1e-12
    assert abs(variance - 1) < tolerance


@pytest.mark.parametrize("ensemble", SIGNED)
@pytest.mark.parametrize("n", [32, 257, 2048])
def test_signed_scores_keep_unit_spread_for_every_n(ensemble, n):
    keys = torch.randn(n, 512, dtype=F64, generator=torch.Generator().manual_seed(n))
    compressed = measurement_matrix(ensemble, 16, n, seed=1, dtype=F64) @ keys
    assert abs(compressed.std() - 1) < 0.25


@pytest.mark.parametrize("ensemble", AVERAGING)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (5, 13), (8, 64), (13, 13), (12, 13)])
@pytest.mark.parametrize("heads", [None, 3])
def test_averaging_rows_sum_to_one(ensemble, m, n, heads):
    made = measurement(ensemble, m, n, heads=heads, dtype=F64)
    assert made.phi.shape[-2:] == (m, n)
    assert (made.phi >= 0).all()
    torch.testing.assert_close(made.phi.sum(-1), torch.ones(made.phi.shape[:-1], dtype=F64))
    # All tokens are measured once: the masses add up to n.
    torch.testing.assert_close(made.score_bias.exp().sum(-1), torch.full((made.phi.shape[0],), float(n), dtype=F64))
    # and phi weighted with the masses covers every token once.
    covered = (made.phi * made.score_bias.exp()[..., None]).sum(1)
    torch.testing.assert_close(covered, torch.ones_like(covered))


@pytest.mark.parametrize("ensemble", SIGNED)
def test_signed_ensembles_have_no_bias(ensemble):
    assert measurement(ensemble, 4, 9).score_bias is None


# --- columns ---


@pytest.mark.parametrize("ensemble", RANDOM_SIGNED)
def test_columns_depend_on_their_position_alone(ensemble):
    short = measurement_matrix(ensemble, 6, 20, seed=11, heads=2, layer=4, dtype=F64)
    long = measurement_matrix(ensemble, 6, 131, seed=11, heads=5, layer=4, dtype=F64)
    torch.testing.assert_close(long[:2, :, :20] * math.sqrt(131 / 20), short, rtol=1e-14, atol=0)
    single = measurement_matrix(ensemble, 6, 20, seed=11, layer=4, dtype=F64)
    assert torch.equal(single, short[0])


@pytest.mark.parametrize("ensemble", ["gaussian", "rademacher", "srht"])
def test_rows_do_not_depend_on_their_number(ensemble):
    few, many = (measurement_matrix(ensemble, m, 40, seed=2, dtype=F64) for m in (3, 17))
    assert torch.equal(few, many[:3])


def test_bucket_of_a_token_depends_on_its_position_alone():
    short = measurement_matrix("bucket", 6, 20, seed=11, heads=2)
    long = measurement_matrix("bucket", 6, 131, seed=11, heads=4)
    assert torch.equal(long[:2, :, :20] > 0, short > 0)


@pytest.mark.parametrize("ensemble", [*RANDOM_SIGNED, "bucket"])
@pytest.mark.parametrize("change", [{"seed": 2}, {"layer": 1}])
def test_seed_layer_and_head_each_draw_anew(ensemble, change):
    base = {"seed": 1, "layer": 0}
    first = measurement_matrix(ensemble, 8, 64, heads=2, **base)
    assert not torch.equal(first, measurement_matrix(ensemble, 8, 64, heads=2, **{**base, **change}))
    assert not torch.equal(first[0], first[1])


def test_dtype_is_a_cast_of_float64_and_the_bias_stays_wide():
    exact = measurement("pool", 5, 13, dtype=F64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = measurement("pool", 5, 13, dtype=dtype)
        assert torch.equal(made.phi, exact.phi.to(dtype))
        assert made.score_bias.dtype == torch.float32
    assert exact.score_bias.dtype == F64


@pytest.mark.parametrize("ensemble", sorted(ENSEMBLES))
def test_values_do_not_depend_on_torch_state(ensemble):
    mask = torch.tensor([[True] * 9 + [False] * 4])
    before = measurement(ensemble, 5, 13, heads=2, key_mask=mask, anchors=("first",))
    torch.set_default_dtype(torch.bfloat16)
    try:
        after = measurement(ensemble, 5, 13, heads=2, key_mask=mask, anchors=("first",))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(before.phi, after.phi)
    assert torch.equal(before.score_bias, after.score_bias)
    assert measurement(ensemble, 2, 4, device="meta").phi.device.type == "meta"


# --- structure ---


@pytest.mark.parametrize("ensemble", ["dct", "haar"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 12, 31, 32, 33, 100])
def test_transforms_are_orthonormal_for_every_n(ensemble, n):
    phi = measurement_matrix(ensemble, n, n, seed=0, dtype=F64)
    torch.testing.assert_close(phi @ phi.T, torch.eye(n, dtype=F64), rtol=0, atol=1e-13)
    assert torch.equal(measurement_matrix(ensemble, max(1, n // 3), n, seed=0, dtype=F64), phi[: max(1, n // 3)])


def test_haar_of_length_four_by_hand():
    h, q = 0.5, math.sqrt(0.5)
    expected = [[h, h, h, h], [h, h, -h, -h], [q, -q, 0, 0], [0, 0, q, -q]]
    torch.testing.assert_close(measurement_matrix("haar", 4, 4, seed=0, dtype=F64), torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (8, 8), (5, 64), (200, 256), (256, 256)])
def test_srht_rows_are_orthonormal_at_powers_of_two(m, n):
    phi = measurement_matrix("srht", m, n, seed=9, heads=2, dtype=F64)
    eye = torch.eye(m, dtype=F64).expand(2, m, m)
    torch.testing.assert_close(phi @ phi.mT, eye, rtol=0, atol=1e-12)


def test_srht_is_the_formula_over_python_integers():
    from csat_ext.philox import philox_bits

    words = [int(word) for word in philox_bits(7, 0, 0, 2**32 - 1, 0)]
    c, a = words[0], words[1] | 1
    signs = [(1 - 2 * (int(philox_bits(7, 0, 0, 0, s)[0]) >> 31)) / math.sqrt(50) for s in range(50)]
    expected = [[signs[s] * (-1) ** ((a * j + c) & s).bit_count() for s in range(50)] for j in range(20)]
    torch.testing.assert_close(measurement_matrix("srht", 20, 50, seed=7, dtype=F64), torch.tensor(expected, dtype=F64))


def test_count_sketch_has_one_entry_a_column():
    phi = measurement_matrix("count_sketch", 8, 300, seed=4, heads=3, dtype=F64)
    assert ((phi != 0).sum(1) == 1).all()
    assert torch.equal(phi.abs().amax(1), torch.full((3, 300), math.sqrt(8 / 300), dtype=F64))
    assert ((phi != 0).sum(2) > 0).all()


def test_buckets_are_balanced_and_a_permutation_at_m_equal_n():
    sizes = (measurement_matrix("bucket", 7, 100, seed=4, heads=3) > 0).sum(-1)
    assert sizes.min() == 14 and sizes.max() == 15
    phi = measurement_matrix("bucket", 9, 9, seed=4, dtype=F64)
    assert torch.equal(phi @ phi.T, torch.eye(9, dtype=F64))


# --- pools ---


def test_pool_of_whole_segments_by_hand():
    made = measurement("pool", 2, 6, dtype=F64)
    third = 1 / 3
    assert torch.equal(made.phi[0], torch.tensor([[third] * 3 + [0] * 3, [0] * 3 + [third] * 3], dtype=F64))
    assert torch.equal(made.score_bias, torch.log(torch.tensor([[3.0, 3.0]], dtype=F64)))


def test_pool_of_fractional_segments_by_hand():
    made = measurement("pool", 2, 3, dtype=F64)
    expected = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]], dtype=F64) / 1.5
    torch.testing.assert_close(made.phi[0], expected)
    torch.testing.assert_close(made.score_bias.exp(), torch.tensor([[1.5, 1.5]], dtype=F64))


@pytest.mark.parametrize("ensemble", POOLS)
def test_pool_is_the_identity_at_m_equal_n(ensemble):
    made = measurement(ensemble, 6, 6, dtype=F64)
    assert torch.equal(made.phi[0], torch.eye(6, dtype=F64))
    assert torch.equal(made.score_bias, torch.zeros(1, 6, dtype=F64))


def test_head_shift_moves_the_inner_borders():
    made = measurement("pool", 4, 20, heads=5, head_shift=True, dtype=F64)
    shifts = [(h + 0.5) / 5 - 0.5 for h in range(5)]
    masses = [[5 * (1 + s), 5, 5, 5 * (1 - s)] for s in shifts]
    torch.testing.assert_close(made.score_bias.exp(), torch.tensor(masses, dtype=F64))
    middle = measurement("pool", 4, 20, dtype=F64)
    torch.testing.assert_close(made.phi[2], middle.phi[0])  # the third of five heads has shift 0
    assert measurement("pool", 4, 20, heads=5).phi.shape == (1, 4, 20)


def test_pool_on_a_2d_grid_averages_cells():
    made = measurement("pool", 8, 32, grid=(4, 8), dtype=F64)
    image = torch.arange(32, dtype=F64).reshape(1, 1, 4, 8)
    expected = torch.nn.functional.avg_pool2d(image, 2).flatten()
    torch.testing.assert_close(made.phi[0] @ image.flatten(), expected)
    torch.testing.assert_close(made.score_bias.exp(), torch.full((1, 8), 4.0, dtype=F64))


def test_pool_on_a_3d_grid_averages_cells():
    made = measurement("pool", 12, 4 * 6 * 4, grid=(4, 6, 4), dtype=F64)
    video = torch.randn(1, 1, 4, 6, 4, dtype=F64)
    expected = torch.nn.functional.avg_pool3d(video, 2).flatten()
    torch.testing.assert_close(made.phi[0] @ video.flatten(), expected)


def test_pool_on_a_grid_is_the_outer_product_of_1d_pools():
    made = measurement("pool", 6, 35, grid=(5, 7), heads=2, head_shift=True, dtype=F64)
    rows = measurement("pool", 2, 5, heads=2, head_shift=True, dtype=F64)
    columns = measurement("pool", 3, 7, heads=2, head_shift=True, dtype=F64)
    outer = torch.einsum("hax,hby->habxy", rows.phi, columns.phi).reshape(2, 6, 35)
    torch.testing.assert_close(made.phi, outer)
    masses = (rows.score_bias[:, :, None] + columns.score_bias[:, None, :]).reshape(2, 6)
    torch.testing.assert_close(made.score_bias, masses)


@pytest.mark.parametrize(
    ("m", "grid", "cells"),
    [(4, (8, 8), (2, 2)), (8, (8, 16), (2, 4)), (8, (16, 8), (4, 2)), (16, (4, 16), (2, 8)), (7, (7, 7), (1, 7)),
     (8, (8, 8, 8), (2, 2, 2)), (6, (1, 9), (1, 6)), (5, (9,), (5,)), (64, (8, 8), (8, 8))],
)  # fmt: skip
def test_cell_grid(m, grid, cells):
    assert cell_grid(m, grid) == cells


def test_cell_grid_that_does_not_exist():
    with pytest.raises(ValueError, match="11 pooled cells"):
        measurement("pool", 11, 64, grid=(8, 8))


# --- anchors ---


@pytest.mark.parametrize("ensemble", sorted(ENSEMBLES))
def test_anchors_are_one_hot_rows_in_front_and_gone_from_the_rest(ensemble):
    made = measurement(ensemble, 6, 15, heads=2, anchors=("last", 3, "first"), dtype=F64)
    one_hot = torch.eye(15, dtype=F64)[[14, 3, 0]]
    assert (made.phi[:, :3] == one_hot).all()
    assert (made.phi[:, 3:, [0, 3, 14]] == 0).all()
    assert (made.score_bias[:, :3] == 0).all()


def test_pool_closes_up_over_its_anchors():
    made = measurement("pool", 5, 14, anchors=("first", "last"), dtype=F64)
    assert torch.equal(made.phi[0, 2:, 1:-1], measurement("pool", 3, 12, dtype=F64).phi[0])
    torch.testing.assert_close(made.score_bias.exp(), torch.tensor([[1, 1, 4, 4, 4]], dtype=F64))


def test_an_anchor_named_twice_is_an_empty_row():
    made = measurement("pool", 4, 8, anchors=("first", 0, -8), dtype=F64)
    assert made.score_bias[0, :3].tolist() == [0, -math.inf, -math.inf]
    assert (made.phi[0, 1:3] == 0).all()
    torch.testing.assert_close(made.phi[0, 3], torch.tensor([0] + [1 / 7] * 7, dtype=F64))


def test_class_token_in_front_of_a_grid():
    made = measurement("pool", 5, 17, anchors=("first",), grid=(4, 4), dtype=F64)
    assert torch.equal(made.phi[0, 1:, 1:], measurement("pool", 4, 16, grid=(4, 4), dtype=F64).phi[0])
    assert made.phi[0, 0].tolist() == [1] + [0] * 16


def test_anchor_inside_a_grid_leaves_its_cell():
    made = measurement("pool", 5, 16, anchors=(5,), grid=(4, 4), dtype=F64)
    torch.testing.assert_close(made.score_bias.exp(), torch.tensor([[1, 3, 4, 4, 4]], dtype=F64))
    assert made.phi[0, 1].nonzero().flatten().tolist() == [0, 1, 4]


# --- masks ---


@pytest.mark.parametrize("ensemble", AVERAGING)
def test_masked_columns_are_zero_and_rows_sum_to_one(ensemble):
    mask = torch.rand(6, 30, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0] = True
    made = measurement(ensemble, 7, 30, heads=3, dtype=F64, key_mask=mask)
    assert made.phi.shape[0] == 6 and made.score_bias.shape == made.phi.shape[:-1]
    assert (made.phi.masked_select(~mask[:, None, None, :]) == 0).all()
    filled = made.score_bias > -math.inf
    torch.testing.assert_close(made.phi.sum(-1), filled.to(F64))
    masses = made.score_bias.exp().sum(-1)
    torch.testing.assert_close(masses, mask.sum(-1, keepdim=True).to(F64).expand_as(masses))
    assert torch.equal(made.phi[0], measurement(ensemble, 7, 30, heads=3, dtype=F64).phi)


@pytest.mark.parametrize("ensemble", POOLS)
@pytest.mark.parametrize("head_shift", [False, True])
def test_masked_pool_is_the_pool_of_the_valid_tokens(ensemble, head_shift):
    mask = torch.rand(5, 24, generator=torch.Generator().manual_seed(1)) < 0.7
    options = {"heads": 2, "head_shift": head_shift, "anchors": ("first", "last"), "dtype": F64}
    made = measurement(ensemble, 6, 24, key_mask=mask, **options)
    for b in range(5):
        removed = measurement(ensemble, 6, int(mask[b].sum()), **options)
        assert torch.equal(made.phi[b][..., mask[b]], removed.phi)
        torch.testing.assert_close(made.score_bias[b], removed.score_bias)


@pytest.mark.parametrize("ensemble", RANDOM_SIGNED)
def test_masked_signed_rows_are_those_of_the_shorter_sequence(ensemble):
    mask = torch.arange(30) < 19  # padding at the end keeps positions
    made = measurement(ensemble, 5, 30, dtype=F64, key_mask=mask[None])
    removed = measurement(ensemble, 5, 19, dtype=F64)
    torch.testing.assert_close(made.phi[0][..., :19], removed.phi, rtol=1e-14, atol=0)
    assert (made.phi[..., 19:] == 0).all()


@pytest.mark.parametrize("ensemble", sorted(ENSEMBLES))
@pytest.mark.parametrize("anchors", [(), ("first", "last")])
def test_everything_masked_is_empty_and_finite(ensemble, anchors):
    mask = torch.tensor([[False] * 12, [True] * 12, [False] * 11 + [True]])
    made = measurement(ensemble, 4, 12, heads=2, anchors=anchors, key_mask=mask)
    assert not made.phi.isnan().any() and not made.score_bias.isnan().any()
    assert (made.phi[0] == 0).all()
    assert (made.score_bias[0] == -math.inf).all()
    assert (made.score_bias[1] > -math.inf).all()
    if anchors:  # the one token is both first and last: once exact, and nothing beside it
        assert made.score_bias[2, 0].tolist() == [0] + [-math.inf] * 3


def test_fewer_valid_tokens_than_segments_share_their_mass():
    mask = torch.tensor([[True, False, True] + [False] * 5])
    made = measurement("pool", 4, 8, dtype=F64, key_mask=mask)
    torch.testing.assert_close(made.score_bias.exp(), torch.full((1, 1, 4), 0.5, dtype=F64))
    assert made.phi[0, 0].argmax(-1).tolist() == [0, 0, 2, 2]


def test_masked_grid_keeps_its_cells():
    mask = torch.ones(1, 17, dtype=torch.bool)
    mask[0, [0, 3, 4, 7, 8, 9]] = False  # the class token, the whole upper right cell and one token of the lower left
    made = measurement("pool", 5, 17, anchors=("first",), grid=(4, 4), key_mask=mask, dtype=F64)
    torch.testing.assert_close(made.score_bias[0, 0].exp(), torch.tensor([0, 4, 0, 3, 4], dtype=F64))
    tokens = [row.nonzero().flatten().tolist() for row in made.phi[0, 0]]
    assert tokens == [[], [1, 2, 5, 6], [], [10, 13, 14], [11, 12, 15, 16]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sizes_masks_and_anchors_give_finite_averages(data):
    n = data.draw(st.integers(2, 40))
    anchors = data.draw(st.lists(st.integers(-n, n - 1), max_size=2))
    m = data.draw(st.integers(len(anchors) + 1, max(n, len(anchors) + 1)))
    if m > n:
        return
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=n, max_size=n))])
    ensemble = data.draw(st.sampled_from(AVERAGING))
    made = measurement(ensemble, m, n, heads=2, anchors=tuple(anchors), key_mask=mask, dtype=F64)
    filled = (made.score_bias > -math.inf).to(F64)
    torch.testing.assert_close(made.phi.sum(-1), filled)
    torch.testing.assert_close(
        made.score_bias.exp().sum(-1), torch.full_like(filled[..., 0], float(mask.sum())), rtol=1e-12, atol=1e-12
    )


# --- torch.compile ---


@pytest.mark.parametrize("ensemble", sorted(ENSEMBLES))
def test_one_graph_for_every_length(ensemble):
    from torch._dynamo.testing import CompileCounter

    def build(x, mask):
        made = measurement(ensemble, 5, x.shape[0], heads=2, anchors=("first", "last"), key_mask=mask)
        return made.phi, made.score_bias

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(build, fullgraph=True, dynamic=True, backend=counter)
    for n in (16, 23, 64):
        mask = torch.arange(2 * n).reshape(2, n) % 3 > 0
        for got, expected in zip(compiled(torch.empty(n), mask), build(torch.empty(n), mask), strict=True):
            assert torch.equal(got, expected)
    assert counter.frame_count == 1


class _Measured(torch.nn.Module):
    def __init__(self, ensemble):
        super().__init__()
        self.ensemble = ensemble

    def forward(self, x):
        return measurement(self.ensemble, 5, x.shape[0], heads=2, dtype=F64).phi


@pytest.mark.parametrize("ensemble", sorted(set(ENSEMBLES) - {"bucket"}))  # its stretches of m tokens guard n modulo m
def test_one_exported_program_for_every_length(ensemble):
    module = _Measured(ensemble)
    lengths = {"x": {0: torch.export.Dim("n", min=8, max=4096)}}
    program = torch.export.export(module, (torch.empty(23),), dynamic_shapes=lengths, strict=False).module()
    for n in (16, 23, 64):
        assert torch.equal(program(torch.empty(n)), module(torch.empty(n)))


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ensemble": "gausian"}, ValueError, "ensemble must be one of .*gaussian.*gausian"),
        ({"m": 9}, ValueError, "m = 9 .* n = 8"),
        ({"m": 0}, ValueError, "m must be at least 1"),
        ({"m": 2.0}, TypeError, "m must be an int"),
        ({"n": True}, TypeError, "n must be an int"),
        ({"n": 2**32}, ValueError, "n must be in"),
        ({"heads": 0}, ValueError, "heads"),
        ({"layer": -1}, ValueError, "layer"),
        ({"layer": 2**32}, ValueError, "layer"),
        ({"ensemble": "gaussian", "seed": -1}, ValueError, "seed"),
        ({"ensemble": "gaussian", "seed": "1"}, TypeError, "seed"),
        ({"seed": -1}, ValueError, "seed"),
        ({"dtype": torch.int32}, TypeError, "dtype"),
        ({"anchors": "first"}, TypeError, "anchors"),
        ({"anchors": ("middle",)}, ValueError, "anchors"),
        ({"anchors": (["first"],)}, ValueError, "anchors"),
        ({"anchors": None}, TypeError, "anchors"),
        ({"ensemble": ["pool"]}, ValueError, "ensemble must be one of"),
        ({"grid": 8}, TypeError, "grid must be a sequence"),
        ({"head_shift": "yes"}, TypeError, "head_shift must be a bool"),
        ({"device": "nowhere"}, ValueError, "device must be"),
        ({"anchors": (0, 1, 2)}, ValueError, "m = 3 with 3 anchors"),
        ({"anchors": (8,)}, ValueError, r"anchors \[8\]"),
        ({"ensemble": "gaussian", "grid": (2, 4)}, ValueError, "grid is an option"),
        ({"ensemble": "bucket", "head_shift": True}, ValueError, "head_shift is an option"),
        ({"grid": (3, 3)}, ValueError, r"grid \(3, 3\) holds 9"),
        ({"grid": (2, 2, 2, 1)}, ValueError, "grid must be"),
        ({"grid": (-2, -4)}, ValueError, "grid must be"),
        ({"key_mask": torch.ones(1, 8)}, TypeError, "key_mask must be a bool"),
        ({"key_mask": torch.ones(1, 7, dtype=torch.bool)}, ValueError, r"\(B, n\) with n = 8"),
        ({"key_mask": torch.ones(8, dtype=torch.bool)}, ValueError, "key_mask"),
        ({"key_mask": torch.ones(1, 8, dtype=torch.bool), "device": "meta"}, ValueError, "key_mask is on cpu"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"ensemble": "pool", "m": 3, "n": 8} | change
    with pytest.raises(error, match=message):
        measurement(arguments.pop("ensemble"), arguments.pop("m"), arguments.pop("n"), **arguments)


def test_measurement_matrix_shapes_and_options():
    assert measurement_matrix("pool", 3, 8, seed=0).shape == (3, 8)
    assert measurement_matrix("pool", 3, 8, seed=0, heads=4).shape == (4, 3, 8)
    with pytest.raises(TypeError, match="key_mask"):
        measurement_matrix("pool", 3, 8, seed=0, key_mask=torch.ones(1, 8, dtype=torch.bool))


def test_a_class_token_named_twice_in_front_of_a_grid():
    phi = measurement("pool", 6, 17, anchors=("first", 0), grid=(4, 4)).phi
    assert bool((phi[:, 1] == 0).all()) and torch.equal(phi[:, 2:, 1:], measurement("pool", 4, 16, grid=(4, 4)).phi)
