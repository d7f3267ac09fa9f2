"""Batches of encoded captioned pictures, for methods that learn from pictures: the peer of `rollout.py`.

Which pictures a step shows, under which of their captions and with which noise is a function of (seed, step) and the
data alone, so that a resume needs no state and replays nothing. Workers read, and decode what is in no cache, ahead of
need; encoding happens here, a batch at a time.

Both encodings are kept on disk by content. Latents are wanted again in every pass, and a picture's posterior does not
change. Texts are, too: what `Pipeline.encode` remembers would outgrow any memory (SD3.5 makes 333 x 4096 numbers of a
caption), and a second run need not call T5's 4.7 billion parameters at all. What comes from disk is bit for bit what
was computed.
"""

import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor
from torch.utils.data import DataLoader

from trimtab import noise
from trimtab.batch import Captions, Condition
from trimtab.cache import Cache, Entry, fingerprint
from trimtab.config import Strict
from trimtab.distributed import ALONE, Processes
from trimtab.errors import UserError
from trimtab.pipelines import Pipeline
from trimtab.worlds.pictures import CURE, Pictures, Unusable

logger = logging.getLogger(__name__)

STATS = ("mean", "std")  # of a picture's latents

Visit = tuple[int, int]  # the number of a picture, and that of one of its captions


class CaptionedConfig(Strict):
    """What one step of training on captioned pictures takes."""

    batch_size: int = Field(4, gt=0)  # pictures a step on each process
    num_workers: int = Field(2, ge=0)  # processes that read and decode; 0: none, and nothing is read ahead
    cache: bool = True  # latents and text embeddings on disk


# ---- which pictures


@dataclass(frozen=True)
class Order:
    """Which pictures the steps show. A pass is a new order of all; what its last step does not fill is not shown.

    Where a step already has a picture's caption, the picture comes in a later step of the pass. Where a caption has
    more pictures than the pass has steps, others are shown again in their place.
    """

    meanings: tuple[tuple[int, ...], ...]  # of each picture's captions; equal numbers are equal captions
    size: int  # pictures a step, over all processes
    seed: int

    def steps(self, start: int) -> Iterator[tuple[int, list[Visit]]]:
        """Step after step with its visits, without end."""
        for step in itertools.count(start):
            number, place = divmod(step, len(self.meanings) // self.size)
            if step == start or place == 0:
                epoch = self.epoch(number)
            yield step, epoch[place]

    def epoch(self, number: int) -> list[list[Visit]]:
        """The steps of one pass; UserError if there are too few different captions for one."""
        visits = self._visits(number)
        of_caption = {self.meaning(visit): visit for visit in visits}
        if len(of_caption) < self.size:  # the luck of the draw, or there are no more
            visits = self._most_different(visits)
            of_caption = {self.meaning(visit): visit for visit in visits}
        if len(of_caption) < self.size:
            raise UserError(
                f"only {len(of_caption)} different captions for batches of {self.size} pictures, which must differ in "
                "theirs; add pictures with other captions, or make training.train_batch_size smaller."
            )
        fresh, again = iter(visits), itertools.cycle(of_caption.values())
        waiting: dict[int, deque[Visit]] = {}
        return [self._step(fresh, waiting, again) for _ in range(len(visits) // self.size)]

    def spares(self, step: int, shown: Sequence[Visit]) -> Iterator[Visit]:
        """Every picture that a step does not show, in an order of that step's own."""
        generator = noise.generator(self.seed, step, noise.SPARES)
        taken = {picture for picture, _ in shown}
        for picture in torch.randperm(len(self.meanings), generator=generator).tolist():
            if picture not in taken:
                caption = torch.randint(len(self.meanings[picture]), (), generator=generator)
                yield picture, int(caption)

    def meaning(self, visit: Visit) -> int:
        picture, caption = visit
        return self.meanings[picture][caption]

    def _visits(self, number: int) -> list[Visit]:
        """Each picture once, with one of its captions at random: of those that none before it has, if there are any."""
        generator = noise.generator(self.seed, number, noise.ORDER)
        order = torch.randperm(len(self.meanings), generator=generator).tolist()
        luck = torch.rand(len(order), generator=generator).tolist()
        visits, used = [], set()
        for picture, u in zip(order, luck, strict=True):
            captions = range(len(self.meanings[picture]))
            free = [c for c in captions if self.meanings[picture][c] not in used] or captions
            visits.append((picture, free[int(u * len(free))]))
            used.add(self.meaning(visits[-1]))
        return visits

    def _most_different(self, visits: list[Visit]) -> list[Visit]:
        """The same pictures in the same order, under captions of which as many differ as can."""
        rows = [picture for picture, captions in enumerate(self.meanings) for _ in captions]
        columns = [meaning for captions in self.meanings for meaning in captions]
        shape = (len(self.meanings), max(columns) + 1)
        matched = maximum_bipartite_matching(csr_array((np.ones(len(rows)), (rows, columns)), shape), "column")
        return [
            (picture, caption if matched[picture] < 0 else self.meanings[picture].index(matched[picture]))
            for picture, caption in visits
        ]

    def _step(self, fresh: Iterator[Visit], waiting: dict[int, deque[Visit]], again: Iterator[Visit]) -> list[Visit]:
        """Those that wait come first, then new ones, then, when there are no more, others again."""
        step: dict[int, Visit] = {}
        for meaning in list(itertools.islice(waiting, self.size)):
            step[meaning] = waiting[meaning].popleft()
            if not waiting[meaning]:
                del waiting[meaning]
        while len(step) < self.size and (visit := next(fresh, None)):
            if self.meaning(visit) in step:
                waiting.setdefault(self.meaning(visit), deque()).append(visit)
            else:
                step[self.meaning(visit)] = visit
        while len(step) < self.size:
            visit = next(again)
            step.setdefault(self.meaning(visit), visit)
        return list(step.values())


def _numbered(pictures: Pictures) -> tuple[tuple[int, ...], ...]:
    """A number for each meaning of each picture's captions."""
    numbers: dict[str, int] = {}
    return tuple(
        tuple(numbers.setdefault(pictures.meaning(text), len(numbers)) for text in captions)
        for captions in pictures.captions
    )


# ---- what workers do


@dataclass(frozen=True)
class Item:
    """A picture and a caption, read."""

    index: int
    text: str
    posterior: Entry
    embedding: Entry
    pixels: Tensor | None  # (3, H, W) uint8; None: the posterior is known


@dataclass(frozen=True)
class Reading:
    """What there is of a process' share of a step, and the pictures that proved broken."""

    items: tuple[Item, ...]
    broken: Mapping[int, str]


@dataclass(frozen=True)
class Reader:
    """The data set of a `DataLoader` whose indices are a step's number and visits. It runs in the workers."""

    pictures: Pictures
    order: Order
    latents: Cache
    texts: Cache
    resolution: int
    own: slice  # which of the pictures of a step this process reads

    def __getitem__(self, wanted: tuple[int, Sequence[Visit]]) -> Reading:
        """Pictures that are broken are replaced by spares, of which each process has its own, or end the reading."""
        step, shown = wanted
        mine = shown[self.own]
        spares = itertools.islice(self.order.spares(step, shown), self.own.start, None, self.own.step)
        items: dict[int, Item] = {}
        broken: dict[int, str] = {}
        for visit in itertools.chain(mine, spares):
            meaning = self.order.meaning(visit)
            try:
                if meaning not in items:
                    items[meaning] = self._item(*visit)
            except Unusable as error:
                broken[visit[0]] = str(error)
            if len(items) == len(mine) or (broken and self.pictures.on_error == "stop"):
                break
        return Reading(tuple(items.values()), broken)

    def _item(self, picture: int, caption: int) -> Item:
        data, text = self.pictures.data(picture), self.pictures.captions[picture][caption]
        posterior = self.latents.find(self.latents.key(data))
        pixels = self.pictures.decode(picture, data, self.resolution) if posterior.tensors is None else None
        embedding = self.texts.find(self.texts.key(text.encode()))
        return Item(picture, text, posterior, embedding, pixels)


# ---- batches


class Captioned:
    """Makes the batch of a step. Each process has other pictures; no two of a batch have the same caption."""

    def __init__(
        self,
        pipeline: Pipeline,
        pictures: Pictures,
        config: CaptionedConfig,
        resolution: int,
        seed: int,
        cache_folder: Path,
        processes: Processes = ALONE,
    ):
        self.processes = processes
        self.pipeline, self.pictures, self.config, self.seed = pipeline, pictures, config, seed
        self.order = Order(_numbered(pictures), config.batch_size * processes.number, seed)
        self.order.epoch(0)  # raises UserError where the captions don't suffice
        self.empty = pipeline.encode([""])  # the shape of a condition
        latents = texts = Cache(None, "", {})
        if config.cache:
            vae, encoders = fingerprint(_parts(pipeline, "vae")), fingerprint(_parts(pipeline, "text", "tokenizer"))
            maker = f"{vae} {pipeline.precision} {resolution}"
            latents = Cache(cache_folder / "latents", maker, dict.fromkeys(STATS, pipeline.latent_shape(resolution)))
            shapes = {name: tuple(x.shape[1:]) for name, x in _tensors(self.empty).items()}
            texts = Cache(cache_folder / "texts", encoders, shapes)
        self.reader = Reader(pictures, self.order, latents, texts, resolution, processes.mine)
        self.broken: set[int] = set()  # pictures that proved so on the way, to any process
        self._ahead: Iterator[Reading] | None = None
        self._next = -1  # the step that `_ahead` has next

    @torch.no_grad()
    def collect(self, step: int) -> Captions:
        """The batch of a step. Broken pictures are replaced, or a UserError, as `pictures.on_error` says."""
        found = self._read(step)
        self._report(found)
        keys = [(self.seed, step, item.index, noise.POSTERIOR) for item in found.items]
        with self.processes.together():  # a cache's disk may be full
            (mean, std), condition = self._posterior(found.items), self._condition(found.items)
        return Captions(
            x0=mean + std * noise.normal(keys, mean.shape[1:]).to(mean),
            condition=condition,
            text=tuple(item.text for item in found.items),
            index=tuple(item.index for item in found.items),
            seed=self.seed,
            step=step,
        )

    def log(self) -> dict[str, float]:
        """Pictures of a step, and how many of all could not be used so far."""
        return {
            "images": float(self.config.batch_size),
            "skipped_pictures": float(len(self.pictures.skipped) + len(self.broken)),
        }

    def state_dict(self) -> dict[str, Any]:
        """What was found broken so far, and which pictures and captions these are the numbers of."""
        return {"broken": sorted(self.broken), "source": self._source()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["source"] == self._source():
            self.broken = set(map(int, state["broken"]))
        else:
            logger.warning("pictures or captions are not those of the interrupted run, which goes on with the new ones")

    def _source(self) -> str:
        return hashlib.sha256(repr((self.pictures.names, self.pictures.captions)).encode()).hexdigest()

    def _read(self, step: int) -> Reading:
        """What the workers have of a step. They go on from it, so that only a jump makes anybody wait."""
        if self._ahead is None or step != self._next:
            loader = DataLoader(
                self.reader,
                batch_size=None,
                sampler=self.order.steps(step),
                num_workers=self.config.num_workers,
                generator=torch.Generator(),  # else it would draw from the global one
            )
            self._ahead = iter(loader)
        self._next = step + 1
        return next(self._ahead)

    def _report(self, found: Reading) -> None:
        """Tell of what is broken. Where one process cannot go on, all stop, each with a sentence."""
        problem, new = None, sorted(found.broken.keys() - self.broken)
        if found.broken and self.pictures.on_error == "stop":
            problem = f"{next(iter(found.broken.values()))}; {CURE}"
        else:
            for index in new:
                logger.warning("%s; it is left out", found.broken[index])
            if len(found.items) < self.config.batch_size:
                problem = (
                    f"only {len(found.items)} pictures are left for a batch of {self.config.batch_size}, "
                    f"{len(self.broken.union(new))} are broken; mend them, or make training.train_batch_size smaller."
                )
        with self.processes.together():
            width = int(self._everybody([len(new)]).max())
            if problem is not None:
                raise UserError(problem)
        if width:
            rows = self._everybody(new + [-1] * (width - len(new)))
            self.broken |= set(rows.flatten().tolist()) - {-1}

    def _everybody(self, row: list[int]) -> Tensor:
        """The rows of all processes (N, the row's length), equally long."""
        own = torch.tensor(row, dtype=torch.int64)
        return self.processes.everybody(own).view(-1, len(row))

    def _posterior(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w)."""

        def encode(missing: list[int]) -> dict[str, Tensor]:
            parts = [self.pipeline.posterior(items[i].pixels[None].float() / 255) for i in missing]
            return {name: torch.cat(column) for name, column in zip(STATS, zip(*parts, strict=True), strict=True)}

        known = self._complete(self.reader.latents, [item.posterior for item in items], encode)
        return tuple(known[name] for name in STATS)

    def _condition(self, items: Sequence[Item]) -> Condition:
        def embed(missing: list[int]) -> dict[str, Tensor]:
            return _tensors(self.pipeline.encode([items[i].text for i in missing]))

        return replace(self.empty, **self._complete(self.reader.texts, [item.embedding for item in items], embed))

    def _complete(
        self, cache: Cache, entries: Sequence[Entry], compute: Callable[[list[int]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors of all entries, stacked by name; the unknown ones are computed and kept. Each is computed alone:
        among others its last bits would depend on what else was unknown, and so on what a cache holds."""
        # A worker looked ahead of the steps before this one, so what it missed is looked up again.
        entries = [cache.find(entry.key) if entry.tensors is None else entry for entry in entries]
        missing = [i for i, entry in enumerate(entries) if entry.tensors is None]
        new = compute(missing) if missing else {}
        for place, i in enumerate(missing):
            entries[i] = Entry(entries[i].key, {name: value[place] for name, value in new.items()})
            cache.write(entries[i])
        rows = [entry.tensors for entry in entries]
        return {name: torch.stack([row[name].to(self.pipeline.device) for row in rows]) for name in rows[0]}


def _parts(pipeline: Pipeline, *beginnings: str) -> dict[str, Any]:
    parts = pipeline.pipe.components.items()
    return {name: part for name, part in parts if name.startswith(beginnings) and part is not None}


def _tensors(condition: Condition) -> dict[str, Tensor]:
    """What differs from prompt to prompt."""
    tensors = {"tokens": condition.tokens, "pooled": condition.pooled}
    return {name: tensor.float() for name, tensor in tensors.items() if tensor is not None}
