"""GPTQ of llm-compressor and GPTQModel and ours: equal codes where the settings coincide, nowhere a larger layer error.

Settings coincide for integers with float32 scales when both take the grid of every group from the original weight, use the same
damping and order, and are given the same Hessian. Then grids are equal to the last bits, and so are codes but for ties: a
weight within float32's rounding of the middle of two codes may go either way, and from there on its output channel goes its own
way. `oracle.undecided` allows that and nothing else. Known differences of conventions, which the functions of `peers` undo:

- Hessians are mean x x' here, 2 sum x x' / tokens in GPTQModel, 2 sum x x' / sequences in llm-compressor. Damping is relative,
  so the factor is without effect, except that a dead input's diagonal of 0 becomes 1 in either.
- llm-compressor's codes are signed; it rounds w / scale + zero, others round w / scale, and at an exact tie that differs for
  odd zero points. GPTQModel gives a symmetric group that has no negative weight half the scale, with zero still in the middle.
- GPTQModel's groups are found as the loop gets to them unless static_groups is asked for; its default order is group-aware.
"""

import functools
import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.qtensor import dequantize, unpack_codes, unpack_parameters
from tests.oracles import gptq as oracle
from tests.parity import peers
from tests.paths import real_data

pytestmark = [pytest.mark.peer, *peers.IGNORED]

LIBRARIES = {"llm_compressor": "llmcompressor", "gptqmodel": "gptqmodel"}
TIE = 1e-4  # of a step: what float32 leaves open after hundreds of updates; 1e-6 is what theirs need
GRIDS = [(bits, symmetric) for bits in (4, 3, 2) for symmetric in (False, True)]
ROOM = 1.005  # one channel in a hundred that met a tie moves a layer's error by one or two in a thousand, either way
LAYERS = ["steep", "outliers", "trained"]


@pytest.fixture(params=LIBRARIES)
def peer(request):
    """One peer's `peers` function."""
    if importlib.util.find_spec(LIBRARIES[request.param]) is None:
        pytest.skip(f"no {request.param} in this environment")
    return getattr(peers, request.param)


@functools.cache
def layer(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(weight (in, out), inputs (tokens, in)) of a layer with correlated inputs."""
    if name == "trained":
        return trained_layer()
    rng = np.random.default_rng(LAYERS.index(name))
    rows, columns, tokens = 512, 128, 2048
    weight = (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32)
    basis, _ = np.linalg.qr(rng.standard_normal((rows, rows)))
    inputs = (rng.standard_normal((tokens, rows)) * np.arange(1, rows + 1) ** -0.5) @ basis
    if name == "outliers":
        inputs *= np.exp(rng.standard_normal(rows))
    return weight, inputs.astype(np.float32)


def trained_layer() -> tuple[np.ndarray, np.ndarray]:
    """The last linear layer of a trained Llama's middle block and what it sees, by transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = real_data("models/babyllama-hf")
    text = real_data("text/tinystories_val.txt").read_text()[:20000]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"][: 8 * 256]
    linear = model.model.layers[len(model.model.layers) // 2].mlp.down_proj
    seen = []
    linear.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(torch.tensor(ids).reshape(8, -1))
    return linear.weight.detach().numpy().T.copy(), seen[0].reshape(-1, linear.in_features).numpy()


def group_of(name: str) -> int:
    return 32 if name == "trained" else 128  # its 352 inputs are no multiple of more


@functools.cache
def theirs(peer, name: str, grid: tuple[int, bool], **options) -> peers.Layer:
    bits, symmetric = grid
    return peer(*layer(name), bits=bits, symmetric=symmetric, group=group_of(name), **options)


def ours(name: str, grid: tuple[int, bool], hessian: np.ndarray, **options):
    """The QTensor of the same layer for a given Hessian, scales in float32."""
    bits, symmetric = grid
    fmt = f"int{bits}-g{group_of(name)}{'-sym' * symmetric}-fp32"
    q, _ = qjax.gptq(jnp.asarray(layer(name)[0]), fmt, hessian=jnp.asarray(hessian), **options)
    return q


def expected(name: str, grid: tuple[int, bool], hessian: np.ndarray, **options) -> oracle.Rounded:
    """The float64 oracle's rounding of the same layer for a given Hessian."""
    return oracle.gptq(layer(name)[0], hessian, *oracle.integers(*grid), group=group_of(name), **options)


def layer_error(name: str, values, hessian: np.ndarray) -> float:
    return oracle.layer_error(np.asarray(values), layer(name)[0], hessian)


def test_hessian(peer):
    """Twice the mean of x x' over tokens, times the tokens of a sequence in llm-compressor."""
    _, inputs = layer("steep")
    mean = inputs.T.astype(np.float64) @ inputs / len(inputs)
    factor = 2 * (len(inputs) if peer is peers.llm_compressor else 1)
    hessian = theirs(peer, "steep", GRIDS[0]).hessian
    np.testing.assert_allclose(hessian, factor * mean, rtol=1e-5, atol=1e-6 * factor * np.max(mean))


@pytest.mark.parametrize(("act_order", "damp"), [(False, 0.01), (True, 0.01), (True, 0.05)])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"int{grid[0]}{'-sym' * grid[1]}")
@pytest.mark.parametrize("name", LAYERS)
def test_equal_settings(peer, name, grid, act_order, damp):
    """Theirs and ours are the float64 oracle's codes but for ties, on equal grids; so our error is theirs but for ties."""
    options = {"act_order": act_order, "damp": damp}
    there = theirs(peer, name, grid, **options)
    reference = expected(name, grid, there.hessian, **options)

    def assert_equal_but_for_ties(codes):
        encode = oracle.integers(*grid)[1]
        assert oracle.disagreements(reference, codes, encode, group=group_of(name), tolerance=TIE) == []
        assert np.mean(np.any(reference.codes != codes, axis=0)) < 0.05  # channels that met a tie

    for part, found in enumerate([there.scales, there.zeros]):
        np.testing.assert_allclose(found, [parameters[part] for parameters in reference.parameters], rtol=3e-7)
    assert_equal_but_for_ties(there.codes)

    q = ours(name, grid, there.hessian, panel=128, clip="none", **options)
    scales, zeros = unpack_parameters(q)
    np.testing.assert_allclose(scales, there.scales, rtol=3e-7)
    np.testing.assert_array_equal(np.full(scales.shape, 2 ** (grid[0] - 1)) if zeros is None else zeros, there.zeros)
    assert_equal_but_for_ties(np.asarray(unpack_codes(q)))
    assert layer_error(name, dequantize(q), there.hessian) <= layer_error(name, there.values, there.hessian) * ROOM


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"int{grid[0]}{'-sym' * grid[1]}")
@pytest.mark.parametrize("name", ["steep", "outliers"])
def test_dynamic_groups(name, grid):
    """Groups found when their turn comes; GPTQModel's are as old as its block of 128 inputs, so groups of 128 are the same."""
    pytest.importorskip("gptqmodel")
    there = theirs(peers.gptqmodel, name, grid, static=False)
    reference = expected(name, grid, there.hessian, static=False)
    q = ours(name, grid, there.hessian, act_order=False, static_groups=False, clip="none")
    codes = np.asarray(unpack_codes(q))
    for found in (there.codes, codes):
        assert oracle.disagreements(reference, found, oracle.integers(*grid)[1], group=128, tolerance=TIE) == []
    tied = np.any(codes != there.codes, axis=0)  # after a tie a channel's later groups go their own way
    assert np.mean(tied) < 0.05
    scales = np.asarray(unpack_parameters(q)[0])
    np.testing.assert_allclose(scales[:, ~tied], there.scales[:, ~tied], rtol=1e-4)  # of weights with float32 updates


DEFAULTS = {peers.llm_compressor: {"act_order": True}, peers.gptqmodel: {"damp": 0.05, "group_aware": True, "static": False}}


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"int{grid[0]}{'-sym' * grid[1]}")
def test_error_of_defaults(peer, grid):
    """Our defaults against theirs: the geometric mean over the layers, but for what ties leave open."""
    ratios = {}
    for name in LAYERS:
        there = theirs(peer, name, grid, **DEFAULTS[peer])
        here = layer_error(name, dequantize(ours(name, grid, there.hessian)), there.hessian)
        ratios[name] = here / layer_error(name, there.values, there.hessian)
    print(grid, peer.__name__, {name: round(ratio, 3) for name, ratio in ratios.items()})
    assert np.exp(np.mean(np.log(list(ratios.values())))) <= ROOM
