"""Every compressor in the registry keeps the contract, and each does what its paper says."""

from __future__ import annotations

import math

import pytest
import torch

from gradcomp import registry
from gradcomp.compressors.onebit import OneBit
from gradcomp.compressors.threshold import Threshold
from gradcomp.compressors.topk import TopK
from gradcomp.errors import ConfigError, GradientError, PacketError
from gradcomp.interfaces import Compressor
from gradcomp.packet import Kind, Packet
from gradcomp.testing_compressor import check_compressor

SPECS = [
    "none",
    "fp16",
    "bf16",
    "threshold",
    "threshold:density=0.01",
    "threshold:density=0.4",
    "threshold:density=1",
    "threshold:tau=0.5",
    "threshold:tau=2e-38",
    "onebit",
    "onebit:block=8",
    "signsgd",
    "signsgd:block=8",
    "signsgd:variant=majority",
    "signsgd:variant=majority,scale=0.001",
    "qsgd",
    "qsgd:levels=1,bucket=8",
    "qsgd:levels=5,bucket=40,norm=l2,seed=7",
    "qsgd:levels=15,bucket=64,feedback=true",
    "terngrad",
    "terngrad:block=72,clip=2.5",
    "terngrad:block=1073741824,feedback=true",
    "natural",
    "natural:block=8,feedback=true,seed=3",
    "topk",
    "topk:k=3",
    "topk:ratio=0.2",
    "topk:ratio=1",
    "dgc",
    "dgc:k=3,momentum=0.9,nesterov=true",
    "dgc:ratio=0.2,momentum=0.5,masking=false,clip=0.5",
    "dgc:ratio=0.01,warmup_steps=3",
    "dgc:ratio=1",
    "adaptive",
    "adaptive:tau=0.5,min_density=0.1,max_density=0.1,decay=0.5,clip=1,clip_every=1",
    "adaptive:clip=5",
    "scheduled",
    'scheduled:stages=[[1,"none"],[2,"topk:ratio=0.1"],[3,"fp16"]],then="onebit:block=8"',
    'scheduled:stages=[[2,"threshold:density=0.1"],[3,"dgc:momentum=0.9"]],then=topk',
    'scheduled:stages=[[1,"none"],[3,"powersgd:rank=1"]],then="randomk:k=3"',
    'scheduled:stages=[[1,"randomk:k=2,unbiased=true"],[2,"powersgd:dense_steps=1"]],then="none"',
    "warmup",
    'warmup:compressor="randomk:ratio=0.05",steps=3',
    'warmup:compressor="threshold:density=0.01",steps=3,start=0.5',
    "powersgd",
    "powersgd:rank=1",
    "powersgd:rank=8,seed=3",
    "powersgd:rank=1,dense_steps=2",
    "powersgd:rank=4,dense_steps=1,seed=3",
    "dct",
    "dct:chunk=8,k=1",
    "dct:chunk=256,k=5",
    "randomk",
    "randomk:k=3",
    "randomk:ratio=1",
    "randomk:ratio=0.1,unbiased=true,seed=5",
    "minmax",
    "minmax:bits=1,block=8",
    "minmax:bits=3,block=64",
    "minmax:bits=8,feedback=false",
    "int8",
    "int8:block=8",
    "int8:block=1048576,feedback=false",
    "fp8",
    "fp8:block=8",
    "fp8:block=32,feedback=false",
    "twobit",
    "twobit:tau=2e-38",
    "twobit:tau=1,feedback=false",
    "factors",
    "auto",
    'auto:candidates=["none","onebit:block=8"],every=50',
    'auto:candidates=["powersgd"]',
    'auto:candidates=["qsgd","bf16"]',
]


def build(spec: str) -> Compressor:
    return registry.compressor(spec)


@pytest.mark.parametrize("spec", SPECS)
def test_contract(spec: str) -> None:
    check_compressor(build(spec))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS)
def test_contract_on_cuda(spec: str) -> None:
    check_compressor(build(spec), "cuda")


def test_every_id_is_in_the_table() -> None:
    assert {spec.partition(":")[0] for spec in SPECS} == set(registry.available_compressors())


@pytest.mark.parametrize("spec", SPECS)
def test_registry_builds_an_equal_one_from_the_config(spec: str) -> None:
    assert build(spec) == registry.compressor(build(spec).config())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("threshold:tau=0", "tau"),
        ("threshold:tau=-1", "tau"),
        ("threshold:tau=1e-40", "tau"),
        ("threshold:tau=1e39", "tau"),
        ("threshold:tau=true", "tau"),
        ("threshold:tau=NaN", "tau"),
        ("threshold:density=0", "density"),
        ("threshold:density=1.5", "density"),
        ("threshold:tau=1,density=0.1", "not both"),
        ("threshold:k=3", "unknown option 'k'"),
        ("onebit:block=0", "block"),
        ("onebit:block=12", "multiple of 8"),
        ("onebit:block=8.0", "block"),
        ("signsgd:variant=vote", "variant"),
        ("signsgd:block=4", "block"),
        ("signsgd:block=12", "multiple of 8"),
        ("signsgd:scale=2", "variant=majority"),
        ("signsgd:variant=majority,scale=0", "scale"),
        ("signsgd:variant=majority,block=64", "variant=feedback"),
        ("qsgd:levels=0", "levels"),
        ("qsgd:levels=128", "levels"),
        ("qsgd:bucket=12", "multiple of 8"),
        ("qsgd:norm=l1", "norm"),
        ("qsgd:seed=-1", "seed"),
        ("terngrad:block=0", "block"),
        ("terngrad:clip=-1", "clip"),
        ("terngrad:feedback=1", "feedback"),
        ("natural:block=9", "multiple of 8"),
        ("natural:levels=3", "unknown option 'levels'"),
        ("topk:ratio=0", "ratio"),
        ("topk:k=0", "k=0"),
        ("topk:k=1,ratio=0.1", "not both"),
        ("minmax:bits=0", "bits"),
        ("minmax:bits=9", "bits"),
        ("minmax:block=12", "multiple of 8"),
        ("minmax:feedback=1", "feedback"),
        ("int8:block=0", "block"),
        ("int8:bits=4", "unknown option 'bits'"),
        ("fp8:block=9", "multiple of 8"),
        ("twobit:tau=0", "tau"),
        ("twobit:tau=1e39", "tau"),
        ("twobit:feedback=2", "feedback"),
        ("none:x=1", "unknown option 'x'"),
        ("dgc:ratio=2", "ratio=2"),
        ("dgc:k=1,ratio=0.1", "not both"),
        ("dgc:momentum=1", "momentum must be < 1"),
        ("dgc:nesterov=true", "needs momentum"),
        ("dgc:masking=1", "masking=1"),
        ("dgc:clip=-1", "clip=-1"),
        ("dgc:warmup_steps=1.5", "warmup_steps=1.5"),
        ("adaptive:tau=0", "tau=0"),
        ("adaptive:min_density=0.1", "min_density=0.1"),
        ("adaptive:max_density=2", "max_density=2"),
        ("adaptive:decay=1", "decay=1"),
        ("adaptive:decay=0.4", "decay=0.4"),
        ("adaptive:clip=0.5", "clip must be 0 or >= 1"),
        ("adaptive:clip_every=0", "clip_every=0"),
        ("scheduled:stages=3", "stages=3"),
        ("scheduled:stages=[3]", "stages has 3"),
        ('scheduled:stages=[[5,"none"],[5,"fp16"]]', "stages=5"),
        ('scheduled:stages=[[5,"zip"]]', "unknown compressor 'zip'"),
        ("scheduled:then=zip", "unknown compressor 'zip'"),
        ("warmup:compressor=onebit", "a ratio or a density"),
        ("warmup:compressor=topk:k=3", "a ratio or a density"),
        ("warmup:start=0.001", "start=0.001"),
        ("warmup:steps=0", "steps=0"),
        ("powersgd:rank=0", "rank=0"),
        ("powersgd:rank=2.0", "rank"),
        ("powersgd:seed=-1", "seed=-1"),
        ("powersgd:dense_steps=-1", "dense_steps=-1"),
        ("powersgd:dense_steps=1.5", "dense_steps=1.5"),
        ("dct:chunk=4", "chunk=4"),
        ("dct:chunk=512", "chunk=512"),
        ("dct:k=0", "k=0"),
        ("randomk:ratio=0", "ratio"),
        ("randomk:k=0", "k=0"),
        ("randomk:k=1,ratio=0.1", "not both"),
        ("randomk:unbiased=1", "unbiased=1"),
        ("randomk:seed=x", "seed='x'"),
    ],
)
def test_bad_options(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(spec)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("grad", [torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int32)], ids=str)
def test_other_dtypes_are_refused(spec: str, grad: torch.Tensor) -> None:
    with pytest.raises(GradientError, match="float32, float16 or bfloat16"):
        build(spec).encode(grad)


def test_sparse_gradients_are_refused() -> None:
    with pytest.raises(GradientError, match="dense"):
        build("none").encode(torch.eye(3).to_sparse())


class TestCast:
    def test_float32_is_exact(self) -> None:
        grad = torch.randn(1000)
        assert torch.equal(build("none").decompress(build("none").encode(grad)), grad)

    @pytest.mark.parametrize(("spec", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
    def test_rounds_as_torch_does(self, spec: str, dtype: torch.dtype) -> None:
        grad = torch.randn(1000) * 100
        assert torch.equal(build(spec).decompress(build(spec).encode(grad)), grad.to(dtype).float())

    def test_fp16_overflow_is_seen(self) -> None:
        decoded = build("fp16").decompress(build("fp16").encode(torch.tensor([65504.0, 65519.0, 65520.0, -1e6])))
        assert decoded.tolist() == [65504.0, 65504.0, math.inf, -math.inf]

    def test_nonfinite_values_stay_where_they_are(self) -> None:
        grad = torch.tensor([1.0, math.nan, -math.inf])
        decoded = build("bf16").decompress(build("bf16").encode(grad))
        assert torch.equal(decoded, grad) or (decoded[0] == 1 and decoded[1].isnan() and decoded[2] == -math.inf)


class TestThreshold:
    def test_sends_what_passes_and_keeps_the_rest(self) -> None:
        c = Threshold(tau=1.0)
        grad = torch.tensor([0.5, 1.0, 1.5, -3.0, -0.25])
        state = c.new_state(grad)
        packet = c.compress(grad, state)
        assert c.decompress(packet).tolist() == [0, 0, 1, -1, 0]
        assert state["residual"].tolist() == [0.5, 1.0, 0.5, -2.0, -0.25]
        assert c.stats(packet, state) == {"tau": 1.0, "density": 0.4}
        assert c.decompress(c.compress(torch.zeros(5), state)).tolist() == [0, 0, 0, -1, 0]

    def test_default_is_a_density(self) -> None:
        assert Threshold() == Threshold(density=0.001)
        assert Threshold(tau=1) == Threshold(tau=1.0)
        assert Threshold(tau=1).config() == {"id": "threshold", "tau": 1.0, "density": None}

    @pytest.mark.parametrize("steady", [0.0, 1.0, 10.0], ids=["noise", "mixed", "steady"])
    @pytest.mark.parametrize("density", [0.001, 0.01, 0.1])
    def test_density_comes_near_what_was_asked(self, density: float, steady: float) -> None:
        generator = torch.Generator().manual_seed(0)
        c = Threshold(density=density)
        base = torch.randn(20_000, generator=generator) * steady
        state = c.new_state(base)
        found = []
        for _ in range(60):
            packet = c.compress(base + torch.randn(20_000, generator=generator), state)
            found.append(c.stats(packet, state)["density"])
        assert density / 3 < sum(found[20:]) / 40 < density * (8 if steady > 1 else 3)
        assert max(found[20:]) < density * 10

    def test_tau_follows_the_gradient(self) -> None:
        c = Threshold(density=0.01)
        state = c.new_state(torch.zeros(10_000))
        for step in range(40):
            c.compress(torch.randn(10_000) * (1.0 if step < 20 else 100.0), state)
            if step == 19:
                before = state["tau"].item()
        assert state["tau"].item() > 10 * before

    def test_a_gradient_with_fewer_elements_than_the_density_drains(self) -> None:
        c = Threshold(density=0.01)
        grad = torch.zeros(10_000)
        grad[::200] = torch.linspace(-3.0, 3.0, 50)
        state = c.new_state(grad)
        for _ in range(300):
            c.compress(grad, state)
        assert state["residual"].abs().max() < 100  # it has been sent 900

    def test_zeros_teach_nothing(self) -> None:
        c = Threshold()
        state = c.new_state(torch.zeros(1000))
        assert c.compress(torch.zeros(1000), state).count == 0
        assert math.isnan(state["tau"].item())
        c.compress(torch.ones(1000), state)
        known = state["tau"].item()
        assert known > 0
        state["residual"].zero_()
        c.compress(torch.zeros(1000), state)
        assert state["tau"].item() == known

    def test_a_map_where_that_is_smaller(self) -> None:
        c = Threshold(tau=0.5)
        assert c.encode(torch.ones(1000)).nbytes == 32 + 250
        assert c.max_nbytes(1000) == 32 + 250


class TestOneBit:
    def test_two_means_a_block(self) -> None:
        c = OneBit(block=8)
        grad = torch.tensor([1.0, 3.0, -1.0, -2.0, -6.0, 0.0, -0.0, 4.0, 5.0, 7.0])
        packet = c.encode(grad)
        assert c.decompress(packet).tolist() == [1.6, 1.6, -3, -3, -3, 1.6, 1.6, 1.6, 6, 6] or torch.allclose(
            c.decompress(packet), torch.tensor([1.6, 1.6, -3, -3, -3, 1.6, 1.6, 1.6, 6, 6])
        )
        assert packet.payload[-2:].tolist() == [0b00011100, 0]

    def test_dead_elements_stay_dead(self) -> None:
        c = OneBit(block=8)
        assert c.decompress(c.encode(torch.tensor([0.0, 0.0, -1.0, -3.0]))).tolist() == [0, 0, -2, -2]

    def test_other_block_sizes_are_refused(self) -> None:
        out = torch.zeros(100)
        with pytest.raises(PacketError, match="blocks of 8"):
            OneBit().decompress_add(OneBit(block=8).encode(torch.ones(100)), out)
        assert not out.any()


class TestTopK:
    def test_ties_go_to_the_lower_index(self) -> None:
        c = TopK(k=3)
        grad = torch.tensor([1.0, -2.0, 2.0, 0.0, -2.0, 2.0])
        assert c.decompress(c.encode(grad)).tolist() == [0, -2, 2, 0, -2, 0]

    def test_zeros_are_not_sent(self) -> None:
        c = TopK(k=3)
        assert c.encode(torch.tensor([0.0, 5.0, -0.0, 0.0])).count == 1

    def test_k_is_at_least_one_and_at_most_all(self) -> None:
        assert TopK(ratio=0.001).encode(torch.ones(10)).count == 1
        assert TopK(ratio=0.25).encode(torch.ones(10)).count == 3
        assert TopK(k=50).encode(torch.ones(10)).count == 10

    def test_sent_values_are_exact_and_leave_nothing(self) -> None:
        c = TopK(ratio=0.1)
        grad = torch.randn(1000)
        state = c.new_state(grad)
        packet = c.compress(grad, state)
        decoded = c.decompress(packet)
        sent = decoded != 0
        assert sent.sum() == 100
        assert torch.equal(decoded[sent], grad[sent])
        assert not state["residual"][sent].any()
        assert grad[~sent].abs().max() <= grad[sent].abs().min()


def test_a_packet_of_another_compressor_is_refused() -> None:
    grad = torch.randn(64)
    packets = {spec: build(spec).encode(grad) for spec in ("none", "fp16", "threshold", "onebit", "topk")}
    for spec in packets:
        for other, packet in packets.items():
            if other != spec:
                with pytest.raises(PacketError, match="kind"):
                    build(spec).decompress(packet)


def test_a_packet_made_by_hand_is_checked_before_anything_is_added() -> None:
    index = torch.tensor([1, 99], dtype=torch.int32).view(torch.uint8)
    packet = Packet(kind=Kind.SIGNS, numel=50_000, payload=index[:4].clone(), count=2, scalar=1.0)
    out = torch.zeros(50_000)
    with pytest.raises(PacketError):
        Threshold().decompress_add(packet, out)
    assert not out.any()
