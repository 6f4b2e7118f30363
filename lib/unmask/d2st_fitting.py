"""One stage of D2ST on its way: steps over shared batches, averaged weights, validation, and what resuming needs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from sklearn.metrics import roc_auc_score

from unmask.d2st_objective import LATE, RATES, Facts, Step, gather, loss, part_of
from unmask.d2st_plan import CARRIED, Batch, Units, batches, groups, judged, spaced
from unmask.detectors.clip_d2st import AdaptedClip
from unmask.pairs import TrainingError
from unmask.prefixes import LivePrefixes, Prefixes
from unmask.profile import digest
from unmask.progress import track
from unmask.training import DIVERGED, save_state, schedule

FRAMES_AT_ONCE = 192  # in a batch that is only judged
TEACHER_FRAMES = 4  # of a clip, whose mean logit stands for those of all


@dataclass(frozen=True)
class Options:
    """How one stage is trained: the profile's `d2st` keys for it, with the seed. even_rates: all parts that learn do so
    at the stage's rate, not at their RATES of it. terms: weight of each, by name."""

    stage: int
    seed: int
    frames: int
    versions: int
    blends: float
    samples: int
    epochs: int
    batch: int
    lr: float
    even_rates: bool
    weight_decay: float
    warmup: float
    ema: float
    recipe: str
    terms: Mapping[str, float]


class Fitter:
    """A training of one stage; `run` leaves the weights of the best epoch in the detector.

    banks: of the splits "train" and "val". state: the file that an interrupted run goes on from, if it has this key.
    """

    def __init__(
        self, accelerator: Accelerator, detector: AdaptedClip, banks: Mapping[str, Prefixes | LivePrefixes],
        options: Options, state: Path, key: str,
    ):  # fmt: skip
        self.accelerator, self.options, self.state, self.key = accelerator, options, state, key
        self.banks, self.side = banks, detector.backbone.map_side
        self.lengths = {split: bank.table["frames"].to_numpy() for split, bank in banks.items()}
        self.step = Step(detector, options.stage, options.terms).to(accelerator.device)
        optimizer = torch.optim.AdamW(_groups(self.step, options))
        self.wrapped, self.optimizer = accelerator.prepare(self.step, optimizer)
        self.teacher: torch.Tensor | None = None
        if options.stage == 2 and options.terms["distillation"]:
            self.teacher = self._teacher()

    def plan(self, epoch: int) -> list[Batch]:
        """The batches of an epoch. TrainingError where the training split lacks what the stage learns from."""
        o = self.options
        try:
            plan = batches(self.banks["train"].table, o.stage, o.samples, o.batch, o.blends, o.seed, epoch)
        except ValueError as error:
            raise TrainingError(f"Stage {o.stage} cannot learn from the training split: {error}") from error
        if min(len(part) for batch in plan for part in (batch.clips, batch.images) if part) < self._processes:
            raise TrainingError(f"d2st.batch is too small to be shared by {self._processes} processes.")
        return plan

    @property
    def _processes(self) -> int:
        return self.accelerator.num_processes

    def run(self, name: str) -> list[dict]:
        """All epochs that are left; returns the history."""
        o, plans = self.options, [self.plan(epoch) for epoch in range(self.options.epochs)]
        history, best, average = self._resume()
        steps, done = sum(map(len, plans)), sum(map(len, plans[: len(history)]))
        for epoch in track(range(len(history), o.epochs), label=f"training {name}, epochs"):
            # Seeded by epoch, so that a resumed run would draw the same.
            torch.manual_seed(int(digest([o.seed, epoch]), 16))
            found = []
            for batch in plans[epoch]:
                self._set_rates(epoch, schedule(done, steps, o.warmup))
                found.append(self._learn(batch))
                done += 1
                self._follow(average, done)
            losses = {term: float(np.mean([one[term] for one in found])) for term in found[0]}
            with self._averaged(average):
                history.append({"epoch": epoch, **losses, **self.validate()})
                if min(range(len(history)), key=lambda i: history[i]["val_loss"]) == epoch:
                    best = {k: v.detach().cpu().clone() for k, v in self.step.state_dict().items()}
            self._save(history, best, average)
        self.step.load_state_dict(best)
        return history

    def _set_rates(self, epoch: int, rate: float) -> None:
        o = self.options
        for group in self.optimizer.param_groups:
            late = o.stage == 2 and epoch == 0 and group["part"] in LATE
            share = 1.0 if o.even_rates else RATES[o.stage][group["part"]]
            group["lr"] = 0.0 if late else o.lr * share * rate

    def _learn(self, batch: Batch) -> dict[str, float]:
        """One step; the loss and its terms."""
        self.step.train()
        total, terms = self.loss_of(batch)
        if not torch.isfinite(total):
            raise TrainingError(DIVERGED.replace("train.lr", "d2st.lr"))
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": total.item()} | {name: value.item() for name, value in terms.items()}

    def loss_of(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a training batch that all processes share, the same in each of them, and its terms."""
        lengths = self.lengths["train"]
        shares = [batch.share(rank, self._processes, lengths) for rank in range(self._processes)]
        with self.accelerator.autocast():
            found = self.wrapped(*self._inputs("train", shares[self.accelerator.process_index].units))
        units = [len(share.units) for share in shares]
        frames = [sum(_length(unit, lengths) for unit in share.units) for share in shares]
        return loss(gather(found, units, frames), self._facts(shares), self.options.stage, self.options.terms)

    def _inputs(self, split: str, units: Units) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Tokens float[F,L,D] of units, and the shapes of groups of one length that follow each other in them."""
        bank, lengths, parts, shapes = self.banks[split], self.lengths[split], [], []
        for _, part in groupby(units, key=lambda unit: (unit[1] >= 0, _length(unit, lengths))):
            numbers, ts = zip(*part, strict=True)
            tokens = bank.tokens(numbers, None if ts[0] < 0 else [[t] for t in ts])
            parts.append(tokens.flatten(0, 1))
            shapes.append(tuple(tokens.shape[:2]))
        return torch.cat(parts).to(self.accelerator.device, non_blocking=True), shapes

    def _facts(self, shares: Sequence[Batch]) -> Facts:
        """What is known of the units of all shares, in the order of `gathered`."""
        table, units, pair = self.banks["train"].table, [], []
        for share in shares:
            first = len(units)
            pair += [-1] * len(share.clips) + [first + k for k in range(len(share.own))] + [-1] * len(share.images)
            units += share.units
        numbers, ts = (list(values) for values in zip(*units, strict=True))
        facts = {
            "labels": torch.tensor(table["label"].to_numpy(np.float32)[numbers]),
            "image": torch.tensor(ts) >= 0,
            "carried": torch.tensor(table["kind"].isin(CARRIED).to_numpy()[numbers]),
            "pair": torch.tensor(pair),
            "unit": torch.repeat_interleave(torch.tensor([_length(unit, self.lengths["train"]) for unit in units])),
        }
        if self.teacher is not None:
            facts["teacher"] = self.teacher[numbers]
        if self.step.boundary is not None:
            edges, facts["known"] = self.banks["train"].edges(numbers, self.side, [[t] for t in ts])
            facts["edges"] = edges.flatten(0, 1)
        return Facts(**{name: value.to(self.accelerator.device) for name, value in facts.items()})

    @torch.no_grad()
    def judge(self, split: str, units: Units) -> np.ndarray:
        """Logits float64[U] of units."""
        self.step.eval()
        found = {}
        for part in groups(units, self.lengths[split], FRAMES_AT_ONCE):
            logits = self.step(*self._inputs(split, part))["logits"]
            found |= dict(zip(part, logits.double().tolist(), strict=True))
        logits = np.array([found[unit] for unit in units])
        if not np.isfinite(logits).all():
            raise TrainingError(DIVERGED.replace("train.lr", "d2st.lr"))
        return logits

    def _teacher(self) -> torch.Tensor:
        """Logits float[clips] of the detector as it came: the mean over some frames of a clip, each judged alone."""
        table = self.banks["train"].table
        carried = table.index[table["kind"].isin(CARRIED) & (table["frames"] > 1)]
        units = [(clip, int(t)) for clip in carried for t in spaced(table.at[clip, "frames"], TEACHER_FRAMES)]
        means = pd.Series(self.judge("train", units)).groupby([clip for clip, _ in units]).mean()
        return torch.tensor(means.reindex(table.index, fill_value=0.0).to_numpy(np.float32))

    def validate(self) -> dict[str, float]:
        """Cross-entropy of the validation units, labels weighing alike, and the AUC of images, of clips, and of clips
        that only time tells apart."""
        table = self.banks["val"].table
        units = judged(table, self.options.stage)
        if not units:
            raise TrainingError("The validation split has nothing to choose the epoch by.")
        facts = table.loc[[clip for clip, _ in units], ["label", "kind"]].assign(image=[t >= 0 for _, t in units])
        return _figures(facts.assign(logit=self.judge("val", units)))

    def _follow(self, average: dict[str, torch.Tensor], done: int) -> None:
        """Move the averaged weights; the average is short at first, so that it forgets the beginning."""
        if self.options.ema:
            keep = min(self.options.ema, (1 + done) / (10 + done))
            own = dict(self.step.named_parameters())
            for name, value in average.items():
                value.lerp_(own[name].detach(), 1 - keep)

    @contextmanager
    def _averaged(self, average: dict[str, torch.Tensor]) -> Iterator[None]:
        """The averaged weights in place of the trained ones, if there are any."""
        own = {name: p for name, p in self.step.named_parameters() if name in average}
        kept = {name: p.detach().clone() for name, p in own.items()}
        for name, p in own.items():
            p.data.copy_(average[name])
        yield
        for name, p in own.items():
            p.data.copy_(kept[name])

    def _save(self, history: list[dict], best: dict, average: dict) -> None:
        if self.accelerator.is_main_process:
            state = {"key": self.key, "history": history, "best": best, "average": average}
            parts = {"step": self.step.state_dict(), "optimizer": self.optimizer.state_dict()}
            save_state(self.state, state | parts)

    def _resume(self) -> tuple[list[dict], dict, dict[str, torch.Tensor]]:
        """History, best weights and averaged ones of an interrupted run with the same key; otherwise a start."""
        state = torch.load(self.state, weights_only=True, map_location="cpu") if self.state.exists() else {}
        trained = {name: p for name, p in self.step.named_parameters() if p.requires_grad and self.options.ema}
        if state.get("key") != self.key:
            return [], {}, {name: p.detach().clone() for name, p in trained.items()}
        self.step.load_state_dict(state["step"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["history"], state["best"], {k: v.to(self.accelerator.device) for k, v in state["average"].items()}


def _length(unit: tuple[int, int], lengths: np.ndarray) -> int:
    return 1 if unit[1] >= 0 else int(lengths[unit[0]])


def _groups(step: Step, options: Options) -> list[dict]:
    """AdamW groups by part and decay: none for biases, norms and embeddings."""
    found: dict[tuple[str, bool], dict] = {}
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            part, decays = part_of(name, options.stage), parameter.ndim > 1 and not name.endswith("embedding")
            group = {"params": [], "part": part, "weight_decay": options.weight_decay if decays else 0.0}
            found.setdefault((part, decays), group)["params"].append(parameter)
    return [found[key] for key in sorted(found)]


def _figures(units: pd.DataFrame) -> dict[str, float]:
    """`Fitter.validate` from label, kind, image and logit of units."""
    found, losses = {}, []
    for name, part in (("image", units[units["image"]]), ("clip", units[~units["image"]])):
        if part["label"].nunique() < 2:
            continue
        cross = np.logaddexp(0, np.where(part["label"] == 1, -part["logit"], part["logit"]))
        losses.append(np.mean([cross[part["label"] == label].mean() for label in (0, 1)]))
        found[f"val_{name}_auc"] = float(roc_auc_score(part["label"], part["logit"]))
        time = part[part["kind"].isin(["varying", "steady"])]
        if time["label"].nunique() == 2:
            found["val_time_auc"] = float(roc_auc_score(time["label"], time["logit"]))
    if not losses:
        raise TrainingError("The validation split lacks real or fake media to choose the epoch by.")
    return {"val_loss": float(np.mean(losses)), **found}
