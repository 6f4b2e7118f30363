"""Losses of the three stages against plain loops, their gradients, empty sets, and one batch spread over processes."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from unmask import d2st_losses as losses


def units(count, dim=6, seed=0):
    """Unit vectors float64[count,dim]."""
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def squared(x, y):
    return sum((float(p) - float(q)) ** 2 for p, q in zip(x, y, strict=True))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


LABELS = torch.tensor([0, 1, 0, 0, 1, 1, 0])
KIND = torch.tensor([0, 0, 1, 0, 0, 0, 1])  # label 1 has one modality alone


# ---- numbers


@pytest.mark.parametrize("t", [2.0, 0.5])
def test_uniformity_is_that_of_all_pairs(t):
    x = units(7)
    mean = np.mean([math.exp(-t * squared(x[i], x[j])) for i in range(7) for j in range(i)])
    assert losses.uniformity(x, t).item() == pytest.approx(math.log(mean), abs=1e-12)
    assert losses.uniformity(torch.eye(7, dtype=torch.float64)).item() == pytest.approx(-4)
    assert losses.uniformity(x[:1].expand(5, -1)).item() == pytest.approx(0, abs=1e-12)


def test_label_alignment_is_that_of_pairs_with_one_label():
    x = units(7)
    expected = np.mean([squared(x[i], x[j]) for i in range(7) for j in range(i) if LABELS[i] == LABELS[j]])
    assert losses.label_alignment(x, LABELS).item() == pytest.approx(expected, abs=1e-12)


def supcon_by_loops(x, labels, temperature, other):
    anchors = []
    for i in range(len(x)):
        same = [j for j in range(len(x)) if j != i and labels[j] == labels[i]]
        positive = [j for j in same if other is not None and other[j] != other[i]] or same
        share = {j: math.exp(float(x[i] @ x[j]) / temperature) for j in range(len(x))}
        below = sum(share[j] for j in range(len(x)) if j in positive or labels[j] != labels[i])
        if positive:
            anchors.append(-np.mean([math.log(share[j] / below) for j in positive]))
    return np.mean(anchors)


@pytest.mark.parametrize("other", [None, KIND])
@pytest.mark.parametrize("labels", [LABELS, torch.tensor([0, 1, 2, 0, 1, 3, 4])])
def test_supcon_is_its_formula(labels, other):
    x = units(7)
    expected = supcon_by_loops(x, labels, 0.2, other)
    assert losses.supcon(x, labels, 0.2, other).item() == pytest.approx(expected, abs=1e-12)


def test_half_consistency_is_that_of_the_first_channels():
    frame, clip = 3 * units(5), 0.2 * units(5, seed=1)
    pairs = zip(frame[:, :3].numpy(), clip[:, :3].numpy(), strict=True)
    cosines = [f @ c / np.sqrt((f @ f) * (c @ c)) for f, c in pairs]
    assert losses.half_consistency(frame, clip).item() == pytest.approx(1 - np.mean(cosines), abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_the_divergence_of_two_coins(temperature):
    logits, teacher = torch.tensor([0.3, -2.0, 5.0]), torch.tensor([1.0, -2.0, -4.0])
    expected = []
    for student, master in zip(logits.tolist(), teacher.tolist(), strict=True):
        p, q = sigmoid(student / temperature), sigmoid(master / temperature)
        expected.append(q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)))
    found = losses.distillation(logits.double(), teacher.double(), temperature).item()
    assert found == pytest.approx(temperature**2 * np.mean(expected), abs=1e-12)
    assert losses.distillation(teacher, teacher) == 0
    assert losses.distillation(torch.tensor([900.0]), torch.tensor([-900.0])).isfinite()


def mmd_by_loops(a, b, labels_a, labels_b):
    def mean(x, y):
        return np.mean([math.exp(-squared(p, q) / w) for p in x for q in y for w in (1 / 8, 1 / 4, 1 / 2, 1, 2)])

    parts = []
    for label in (0, 1):
        own, others = a[labels_a == label], b[labels_b == label]
        if len(own) and len(others):
            parts.append(mean(own, own) + mean(others, others) - 2 * mean(own, others))
    return np.mean(parts) if parts else 0


@pytest.mark.parametrize("labels_b", [[0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
def test_mmd_is_its_formula_class_by_class(labels_b):
    a, b, labels_b = units(7), units(4, seed=1), torch.tensor(labels_b)
    expected = mmd_by_loops(a, b, LABELS, labels_b)
    assert losses.mmd(a, b, LABELS, labels_b).item() == pytest.approx(expected, abs=1e-12)


def test_mmd_ignores_how_many_of_a_class_there_are():
    a = units(7)
    again = torch.cat([a, a[LABELS == 0]])
    labels = torch.cat([LABELS, LABELS[LABELS == 0]])
    assert losses.mmd(a, again, LABELS, labels).item() == pytest.approx(0, abs=1e-12)
    assert losses.mmd(a, again.flip(0), LABELS, labels).item() > 0.05, "other labels"


def test_boundary_mse_is_that_of_the_known_maps():
    rng = np.random.default_rng(0)
    logits, target, known = rng.normal(0, 3, (4, 5, 5)), rng.random((4, 5, 5)), np.array([True, False, True, False])
    pairs = zip(logits[known].flat, target[known].flat, strict=True)
    expected = np.mean([(sigmoid(x) - y) ** 2 for x, y in pairs])
    tensors = [torch.from_numpy(x) for x in (logits, target, known)]
    assert losses.boundary_mse(*tensors).item() == pytest.approx(expected, abs=1e-12)


# ---- gradients, precision, nothing to compare


def cases(count, dtype=torch.float64):
    """Every loss as a function of rows float[count,...] alone, and such rows."""
    labels, kind, known = LABELS[:count], KIND[:count], torch.arange(count) % 2 == 0
    rows, fixed = units(count).to(dtype), units(count, seed=5).to(dtype)
    maps, targets = (x[:, :, None] * x[:, None, :] for x in (rows, fixed.abs()))
    return {
        "uniformity": (losses.uniformity, rows),
        "alignment": (lambda x: losses.label_alignment(x, labels), rows),
        "supcon": (lambda x: losses.supcon(x, labels, 0.2), rows),
        "supcon across": (lambda x: losses.supcon(x, labels, 0.2, kind), rows),
        "consistency": (lambda x: losses.half_consistency(x, fixed), rows),
        "distillation": (lambda x: losses.distillation(x, fixed[:, 0]), rows[:, 0]),
        "mmd": (lambda x: losses.mmd(x, fixed, labels, labels.flip(0)), rows),
        "mmd, second": (lambda x: losses.mmd(fixed, x, labels, labels.flip(0)), rows),
        "boundary": (lambda x: losses.boundary_mse(x, targets, known), maps),
    }


@pytest.mark.parametrize("name", cases(1))
def test_gradients_are_right(name):
    loss, rows = cases(7)[name]
    assert torch.autograd.gradcheck(loss, rows.clone().requires_grad_())
    assert loss(rows).ndim == 0


@pytest.mark.parametrize("name", cases(1))
@pytest.mark.parametrize("count", [0, 1])
def test_where_there_is_nothing_to_compare_the_loss_is_zero_and_so_is_its_gradient(name, count):
    loss, rows = cases(count, torch.float32)[name]
    rows = rows.requires_grad_()
    found = loss(rows)
    found.backward()
    alone = name in ("consistency", "distillation", "boundary") or name.startswith("mmd")  # compared with the other set
    assert found.isfinite() and rows.grad.isfinite().all()
    if count == 0 or not alone:
        assert found == 0 and not rows.grad.any()


def test_without_a_common_label_or_a_known_map_the_loss_is_zero_and_so_is_its_gradient():
    x, zeros, ones = units(3).requires_grad_(), torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    different = torch.arange(3)
    maps = torch.rand(3, 2, 2)
    for found in (
        losses.label_alignment(x, different), losses.supcon(x, different), losses.supcon(x, different, other=zeros),
        losses.mmd(x, units(3, seed=1), zeros, ones), losses.boundary_mse(x[:, :, None], maps[:, :1, :1], zeros.bool()),
    ):  # fmt: skip
        (gradient,) = torch.autograd.grad(found, x)
        assert found == 0 and not gradient.any()


def test_teachers_get_no_gradient():
    frame, clip = units(3).requires_grad_(), units(3, seed=1).requires_grad_()
    (losses.half_consistency(frame, clip) + losses.distillation(frame[:, 0], clip[:, 0])).backward()
    assert clip.grad is None and frame.grad.any()
    assert not frame.grad[:, 3:].any(), "the second half is free"


@pytest.mark.parametrize("name", cases(1))
def test_half_precision_around_it_changes_nothing(name):
    loss, rows = cases(7, torch.float32)[name]
    with torch.autocast("cpu", torch.bfloat16):
        found, rough = loss(rows), loss(rows.bfloat16())
    assert found.dtype == rough.dtype == torch.float32
    assert torch.equal(found, loss(rows)) and torch.equal(rough, loss(rows.bfloat16().float()))


# ---- several processes


def model():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6)).double()


def batch():
    """Inputs, labels and modality of the global batch, and whether its rows are known."""
    return units(7, 5, seed=2), LABELS, KIND, LABELS == 1


def total(rows, labels, kind, known):
    z = torch.nn.functional.normalize(rows, dim=1)
    loss = losses.uniformity(z) + losses.label_alignment(z, labels) + losses.supcon(z, labels, 0.2, kind)
    return loss + losses.boundary_mse(rows.view(-1, 2, 3), torch.zeros(len(rows), 2, 3), known)


def work(rank, file, spread, out):
    """One process: its rows of the global batch through the model, gathered, and the loss of all of them."""
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    found = []
    for sizes in spread:
        start = sum(sizes[:rank])
        x, *rest = (part[start : start + sizes[rank]] for part in batch())
        wrapped = DistributedDataParallel(model())
        loss = total(losses.gathered(wrapped(x), sizes), *(losses.gathered(part, sizes) for part in rest))
        loss.backward()
        found.append({"loss": loss.detach(), "gradients": [p.grad for p in wrapped.parameters()]})
    for sizes in ([*spread[-1], 1], [9, 9]):
        with pytest.raises(ValueError, match="do not fit"):
            losses.gathered(x, sizes)
    torch.save(found, f"{out}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_the_gradient_of_the_global_batch(tmp_path):
    spread = [(3, 4), (7, 0)]
    torch.multiprocessing.spawn(work, (tmp_path / "store", spread, tmp_path / "out"), nprocs=2)
    x, *rest = batch()
    with torch.random.fork_rng():
        alone = model()
    loss = total(losses.gathered(alone(x), [7]), *rest)
    loss.backward()
    for rank in (0, 1):
        for found in torch.load(tmp_path / f"out-{rank}.pt", weights_only=True):
            torch.testing.assert_close(found["loss"], loss.detach(), rtol=0, atol=1e-12)
            for theirs, p in zip(found["gradients"], alone.parameters(), strict=True):
                torch.testing.assert_close(theirs, p.grad, rtol=0, atol=1e-12)
