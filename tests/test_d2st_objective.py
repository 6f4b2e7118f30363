"""What each stage minimises and moves: against plain sums over units, term by term."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny_clips
import torch
from torch.nn import functional as F

from unmask import d2st_losses
from unmask.d2st_objective import LATE, RATES, TERMS, Facts, Step, loss, part_of
from unmask.detectors import base
from unmask.detectors.clip_backbone import load

OFF = {stage: dict.fromkeys(names, 0.0) for stage, names in TERMS.items()}
CASES = [(stage, name) for stage, names in TERMS.items() for name in names]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load(tiny_clips.write(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def make(backbone):
    """Factory of steps: a detector with noise on its adapters, and what a stage adds to it."""

    def call(stage, kind="d2st", weights=1.0, **given):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            detector = base.build(kind, backbone=backbone, **{"placement": "last-2", "frames": 4} | given)
            for parameter in detector.adapters.parameters():
                parameter.data += 0.3 * torch.randn(parameter.shape)
            return Step(detector, stage, dict.fromkeys(TERMS[stage], weights))

    return call


PATH = ["norm.weight", "norm.bias"] + [f"{w}.{p}" for w in ("query", "key", "value", "out") for p in ("weight", "bias")]
OFFSETS = ["offsets.conv.weight", "offsets.conv.bias", "offsets.norm.weight", "offsets.norm.bias"]
OFFSETS = [*OFFSETS, "offsets.to_offset.weight"]
SHARED = [f"{w}.{p}" for w in ("down", "positional", "up") for p in ("weight", "bias")]
WHOLE = {"linear.weight", "linear.bias"}
RATE = {  # of an adapter's parameters, by stage; what is not here stays as it is
    1: dict.fromkeys([*SHARED, *(f"paths.spatial.{x}" for x in [*PATH, *OFFSETS])], 1.0),
    2: dict.fromkeys(SHARED, 5e-5 / 2e-4)
    | dict.fromkeys([f"paths.temporal.{x}" for x in [*PATH, *OFFSETS]], 1.0)
    | dict.fromkeys([f"paths.spatial.{x}" for x in [*PATH, *OFFSETS]], 2e-5 / 2e-4),
    3: dict.fromkeys(
        ["up.weight", "up.bias"]
        + [f"paths.{p}.{x}" for p in ("spatial", "temporal") for x in PATH if x.split(".")[0] in ("norm", "out")],
        1.0,
    ),
}
HEAD = {1: 1.0, 2: 0.25, 3: 1.0}
ADDED = {1: ["boundary"], 2: [], 3: ["projection"]}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_learns_and_how_fast(make, stage):
    step = make(stage)
    expected = {f"detector.adapters.{k}.{name}": rate for k in (0, 1) for name, rate in RATE[stage].items()}
    expected |= {f"detector.{name}": HEAD[stage] for name in WHOLE}
    expected |= {f"{name}.{p}": HEAD[stage] for name in ADDED[stage] for p in ("weight", "bias")}
    learns = {name for name, parameter in step.named_parameters() if parameter.requires_grad}
    assert learns == set(expected)
    assert {name: RATES[stage][part_of(name, stage)] for name in learns} == pytest.approx(expected)
    late = {name for name in learns if part_of(name, stage) in LATE}
    spatial = {f"detector.adapters.{k}.paths.spatial.{x}" for k in (0, 1) for x in OFFSETS}
    assert late == (spatial if stage == 2 else set())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_learns_of_an_st_adapter_and_of_an_embedding(make, stage):
    frozen = {1: {"time"}, 2: set(), 3: {"down", "time"}}[stage]
    for name, parameter in make(stage, "st-adapter").named_parameters():
        if found := re.match(r"detector\.adapters\.\d\.(\w+)", name):
            assert parameter.requires_grad == (found[1] not in frozen), name
    places = [p for name, p in make(stage, embedding=True).named_parameters() if name.endswith(".embedding")]
    assert len(places) == 2 and all(p.requires_grad == (stage != 3) for p in places)


def test_a_next_stage_moves_what_the_one_before_did_not(make):
    step = make(1)
    assert not step.detector.adapters[0].paths["temporal"].out.weight.requires_grad
    step = Step(step.detector, 2, OFF[2])
    assert (
        all(p.requires_grad for p in step.detector.adapters.parameters()) and step.boundary is step.projection is None
    )
    step = Step(step.detector, 3, OFF[3])
    assert not step.detector.adapters[0].down.weight.requires_grad and step.projection is None
    assert Step(step.detector, 1, OFF[1]).boundary is None
    assert not any(p.requires_grad for p in step.detector.backbone.parameters())


@torch.no_grad()
def test_a_step_gives_what_the_losses_need(make):
    images = tiny_clips.images(11)
    for stage in (1, 2, 3):
        step = make(stage)
        detector = step.detector
        shapes = [(2, 4), (3, 1)]
        found = step(detector.prefix(images), shapes)
        units = [images[:4], images[4:8], *images[8:].split(1)]
        means = torch.cat([detector.features(unit[None]) for unit in units])
        torch.testing.assert_close(found["features"], means, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["logits"], torch.cat([detector(unit[None]) for unit in units]))
        frames = torch.cat([detector.embed(detector.prefix(unit), [(1, len(unit))]) for unit in units])
        torch.testing.assert_close(found["frames"], detector.head(frames)[:, 0], atol=1e-5, rtol=1e-5)
        assert set(found) == {"features", "logits", "frames"} | {1: {"edges"}, 2: set(), 3: {"projected"}}[stage]
        if stage == 1:
            tokens = detector.tokens(detector.prefix(images), shapes)
            for f, y, x in ((0, 0, 0), (5, 1, 3), (10, 3, 2)):
                own = step.boundary.weight[0] @ tokens[f, 1 + 4 * y + x] + step.boundary.bias[0]
                torch.testing.assert_close(found["edges"][f, y, x], own)
        if stage == 3:
            plain = means / means.norm(dim=1, keepdim=True) @ step.projection.weight.T + step.projection.bias
            torch.testing.assert_close(
                found["projected"], plain / plain.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-5
            )
            assert found["projected"].shape == (5, 128)


# Units of a batch of stage 3: four clips of two or three frames (the third is one whose label only motion tells), their
# own frames, and three images. Stages 1 and 2 have a part of them.
LENGTHS = [3, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1]
LABELS = [0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1]
CARRIED = [1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1]
PAIR = [-1, -1, -1, -1, 0, 1, 2, 3, -1, -1, -1]


def batch(stage):
    """Outputs and facts of a stage, and the numbers of the units that it has."""
    units = {1: [8, 9, 10, 7], 2: [0, 1, 2, 3], 3: list(range(11))}[stage]
    rng = torch.Generator().manual_seed(3)
    frames = sum(LENGTHS[u] for u in units)
    found = {
        "features": torch.randn(len(units), 20, generator=rng),
        "logits": torch.randn(len(units), generator=rng),
        "frames": torch.randn(frames, generator=rng),
        "edges": torch.randn(frames, 4, 4, generator=rng),
        "projected": F.normalize(torch.randn(len(units), 8, generator=rng), dim=1),
    }
    facts = Facts(
        labels=torch.tensor([float(LABELS[u]) for u in units]),
        image=torch.tensor([LENGTHS[u] == 1 for u in units]),
        carried=torch.tensor([bool(CARRIED[u]) for u in units]),
        pair=torch.tensor([PAIR[u] if stage == 3 else -1 for u in units]),
        unit=torch.tensor([k for k, u in enumerate(units) for _ in range(LENGTHS[u])]),
        teacher=torch.randn(len(units), generator=rng),
        edges=torch.rand(frames, 4, 4, generator=rng),
        known=torch.tensor([k % 2 == 0 for k in range(frames)]),
    )
    return found, facts, units


def cross(logit, label):
    return math.log1p(math.exp(-logit)) if label else math.log1p(math.exp(logit))


def kl(student, teacher, temperature=2.0):
    p, q = (1 / (1 + math.exp(-x / temperature)) for x in (teacher, student))
    return temperature**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))


def by_hand(stage, found, units):
    """Every term of a stage, by plain loops over its units."""
    z, x = found["logits"].tolist(), found["features"].double().numpy()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    image = [k for k, u in enumerate(units) if LENGTHS[u] == 1 and CARRIED[u]]
    clip = [k for k, u in enumerate(units) if LENGTHS[u] > 1]
    y = [LABELS[u] for u in units]
    terms = {name: np.mean([cross(z[k], y[k]) for k in which]) if which else 0.0
             for name, which in (("image_ce", image), ("clip_ce", clip))}  # fmt: skip
    pairs = [(i, j) for i in range(len(y)) for j in range(i)]
    apart = {(i, j): float(((unit[i] - unit[j]) ** 2).sum()) for i, j in pairs}
    if stage == 1:
        terms["uniformity"] = math.log(np.mean([math.exp(-2 * d) for d in apart.values()]))
        terms["label_alignment"] = np.mean([d for (i, j), d in apart.items() if y[i] == y[j]])
    if stage == 2:
        frames = found["frames"].tolist()
        terms["frame_ce"] = np.mean(
            [cross(z, k) for z, k in zip(frames, [0, 0, 0, 1, 1, None, None, 0, 0], strict=True) if k is not None]
        )
    if stage == 3:
        own = [(4, 0), (5, 1), (7, 3)]
        cosines = [x[a, :10] @ x[b, :10] / np.linalg.norm(x[a, :10]) / np.linalg.norm(x[b, :10]) for a, b in own]
        terms["consistency"] = 1 - np.mean(cosines)
        terms["agreement"] = np.mean([kl(z[a], z[b]) for a, b in own])
        kept = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]  # all but the own frame of the third clip
        terms["supcon"] = contrast(found["projected"].double().numpy()[kept], [y[k] for k in kept],
                                   [LENGTHS[units[k]] > 1 for k in kept])  # fmt: skip
        terms["mmd"] = discrepancy(unit, y, [k for k in kept if k > 3], [0, 1, 2, 3])
    return terms


def contrast(p, y, modality):
    found = []
    for i in range(len(y)):
        same = [j for j in range(len(y)) if j != i and y[j] == y[i] and modality[j] != modality[i]]
        others = [math.exp(p[i] @ p[j] / 0.1) for j in range(len(y)) if y[j] != y[i]]
        everything = sum(others) + sum(math.exp(p[i] @ p[j] / 0.1) for j in same)
        found.append(-np.mean([p[i] @ p[j] / 0.1 - math.log(everything) for j in same]))
    return np.mean(found)


def discrepancy(unit, y, images, clips):
    def kernel(i, j):
        return np.mean([math.exp(-((unit[i] - unit[j]) ** 2).sum() / w) for w in d2st_losses.KERNEL_WIDTHS])

    found = []
    for label in (0, 1):
        a, b = ([k for k in part if y[k] == label] for part in (images, clips))
        means = [np.mean([kernel(i, j) for i in s for j in t]) for s, t in ((a, a), (b, b), (a, b))]
        found.append(means[0] + means[1] - 2 * means[2])
    return np.mean(found)


def expected(stage):
    found, facts, units = batch(stage)
    terms = by_hand(stage, found, units)
    if stage == 1:
        errors = (1 / (1 + np.exp(-found["edges"].double().numpy())) - facts.edges.double().numpy()) ** 2
        terms["boundary"] = np.mean([errors[0].mean(), errors[2].mean()])
    if stage == 2:
        z, teacher = found["logits"].tolist(), facts.teacher.tolist()
        terms["distillation"] = np.mean([kl(z[k], teacher[k]) for k in (0, 1, 3)])
    return terms


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_terms_by_hand(stage):
    found, facts, _ = batch(stage)
    weights = {name: 0.3 + 0.2 * k for k, name in enumerate(TERMS[stage])}
    total, terms = loss(found, facts, stage, weights)
    wanted = expected(stage)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    base_loss = (wanted["image_ce"] + wanted["clip_ce"]) * (0.5 if stage == 3 else 1)
    assert total.item() == pytest.approx(base_loss + sum(weights[name] * wanted[name] for name in weights), rel=1e-4)
    assert min(abs(wanted[name]) for name in weights) > 1e-3, "a term of 0 would hide its weight"


@pytest.mark.parametrize("stage, name", CASES)
def test_each_term_is_switched_on_and_off(stage, name):
    found, facts, _ = batch(stage)
    plain, terms = loss(found, facts, stage, OFF[stage])
    assert set(terms) == {"image_ce", "clip_ce"}
    total, terms = loss(found, facts, stage, OFF[stage] | {name: 2.0})
    assert set(terms) == {"image_ce", "clip_ce", name}
    assert (total - plain).item() == pytest.approx(2 * expected(stage)[name], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("stage, name", CASES)
def test_what_is_off_costs_nothing(stage, name, monkeypatch):
    found, facts, _ = batch(stage)
    for one in ("uniformity", "label_alignment", "boundary_mse", "distillation", "supcon", "half_consistency", "mmd"):
        monkeypatch.setattr(d2st_losses, one, lambda *given, **more: pytest.fail("computed"))
    loss(found, replace(facts, teacher=None, edges=None, known=None), stage, OFF[stage])


def test_labels_that_only_motion_tells_reach_no_image():
    """The label of the third clip, whose own frame is unit 6, can be anything but for what sees the clip as a whole."""
    found, facts, _ = batch(3)
    weights = OFF[3] | {"consistency": 1.0, "agreement": 1.0}
    inputs = {name: value.clone().requires_grad_() for name, value in found.items()}
    total, terms = loss(inputs, facts, 3, weights)
    total.backward()
    assert inputs["logits"].grad[6] == 0 and not inputs["features"].grad[6].any()
    assert inputs["logits"].grad[2] != 0, "the clip itself has its label"
    assert inputs["logits"].grad[5] != 0 and inputs["features"].grad[5].any()
    flipped = replace(facts, labels=torch.where(torch.arange(11) == 6, 0.0, facts.labels))
    everything = dict.fromkeys(TERMS[3], 1.0)
    assert loss(found, flipped, 3, everything)[0] == loss(found, facts, 3, everything)[0]
    found, facts, _ = batch(2)
    inputs = {name: value.clone().requires_grad_() for name, value in found.items()}
    weights = {"frame_ce": 1.0, "distillation": 1.0}
    loss(inputs, facts, 2, weights)[0].backward()
    assert inputs["frames"].grad.ne(0).tolist() == [True] * 5 + [False] * 2 + [True] * 2
    other = replace(facts, teacher=facts.teacher + torch.tensor([0, 0, 5.0, 0]))
    assert loss(found, other, 2, weights)[0] == loss(found, facts, 2, weights)[0]


def test_a_clip_teaches_its_frame_and_is_not_taught_by_it():
    found, facts, _ = batch(3)
    inputs = {name: value.clone().requires_grad_() for name, value in found.items()}
    plain = {name: value.clone().requires_grad_() for name, value in found.items()}
    loss(inputs, facts, 3, OFF[3] | {"consistency": 1.0, "agreement": 1.0})[0].backward()
    loss(plain, facts, 3, OFF[3])[0].backward()
    assert not inputs["features"].grad[:4].any() and torch.equal(inputs["logits"].grad[:4], plain["logits"].grad[:4])
    assert inputs["features"].grad[4, :10].any() and not inputs["features"].grad[4, 10:].any()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_batches_without_what_a_term_compares(stage):
    found, facts, _ = batch(stage)
    nothing = replace(facts, carried=torch.zeros_like(facts.carried), known=torch.zeros_like(facts.known))
    inputs = {name: value.clone().requires_grad_() for name, value in found.items()}
    total, terms = loss(inputs, nothing, stage, dict.fromkeys(TERMS[stage], 1.0))
    total.backward()
    assert torch.isfinite(total) and terms["image_ce"] == 0
    zero = {1: ["boundary"], 2: ["frame_ce", "distillation"], 3: ["consistency", "agreement", "mmd"]}[stage]
    assert all(terms[name] == 0 for name in zero)
    assert all(value.grad is None or torch.isfinite(value.grad).all() for value in inputs.values())
