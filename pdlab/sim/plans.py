"""The instances an experiment asks for: what each costs, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from pdlab import batching, cost
from pdlab.core.instance_spec import MeasuredInstance, Placed, instance_spec
from pdlab.core.kv import PLAIN, UNBOUNDED, BlockLayout, BlockPool
from pdlab.core.scheduler import Scheduler
from pdlab.core.types import InstanceSpec, Role, UsageError
from pdlab.cost.parallel import fitting
from pdlab.cost.profile import InstanceProfile, Overheads
from pdlab.experiment.cluster import Placement
from pdlab.experiment.experiment import Experiment, indivisible

Profiles = tuple[tuple[tuple[int, float], ...], tuple[tuple[int, int, float], ...]]


@dataclass(frozen=True, slots=True)
class InstancePlan:
    """One kind of instance: all that its incarnations share."""

    placement: Placement
    cost: cost.Cost
    kv_blocks: int
    context_tokens: int  # of prompt and output, at most; 0: not known
    token_bytes: int
    element_bytes: float  # of a number of KV
    block_bytes: int
    ranks: int  # that hold a sequence's KV
    kv_heads: int  # of the model; 1: a latent vector; 0: not told
    windows: tuple[tuple[int, int], ...]  # (of a token's bytes, tokens that those layers keep)
    overheads: Overheads
    profile: InstanceProfile | None  # as pdlab calibrate has measured it
    prefill_profile: tuple[tuple[int, float], ...]
    decode_profile: tuple[tuple[int, int, float], ...]

    def spec(self, name: str, role: Role, host: str, *, link_bytes_per_s: float = 0.0, host_bytes_per_s: float = 0.0) -> InstanceSpec:
        engine = self.placement.engine
        placed = Placed(
            name=name,
            role=role,
            host=host,
            rack=self.placement.rack,
            zone=self.placement.zone,
            max_seqs=engine.max_seqs,
            max_batch_tokens=engine.max_batch_tokens,
            prefix_cache=engine.prefix_cache,
            watermark=engine.watermark,
        )
        measured = MeasuredInstance(
            kv_blocks=self.kv_blocks,
            block_tokens=engine.block_tokens,
            block_bytes=self.block_bytes,
            context_tokens=self.context_tokens,
            sequence_tokens=self.scheduler(0).most_tokens if self.windows else 0,
            prefill_profile=self.prefill_profile,
            decode_profile=self.decode_profile,
            link_bytes_per_s=link_bytes_per_s,
            host_bytes_per_s=host_bytes_per_s,
        )
        return instance_spec(placed, measured)

    @property
    def layout(self) -> BlockLayout:
        """Its blocks' bytes by how much of a sequence they are kept, in whole numbers as small as can be."""
        if not self.windows:
            return PLAIN
        engine = self.placement.engine
        full = self.token_bytes - sum(size for size, _ in self.windows)
        unit = gcd(full, *(size for size, _ in self.windows))
        chunk_tokens = engine.max_batch_tokens if batching.chunks(engine.batching) else UNBOUNDED
        return BlockLayout(full // unit, tuple((size // unit, tokens) for size, tokens in self.windows), chunk_tokens)

    def scheduler(self, hash_tokens: int) -> Scheduler:
        engine = self.placement.engine
        scheduler = Scheduler(
            BlockPool(self.kv_blocks, engine.block_tokens, hash_tokens, engine.prefix_cache, self.layout),
            batching.load(engine.batching),
            max_batch_tokens=engine.max_batch_tokens,
            max_seqs=engine.max_seqs,
            watermark=engine.watermark,
        )
        scheduler.profile(self.prefill_profile, self.decode_profile)
        return scheduler


def plans(experiment: Experiment, hash_tokens: int) -> list[InstancePlan]:
    """Every instance of the cluster, with its cost and capacity."""
    model = cost.model(experiment.model, experiment.base_dir)
    known: dict[tuple[object, cost.Parallel, object], tuple[cost.Cost, int, Profiles]] = {}
    found = []
    for placement in experiment.placements():
        engine = placement.engine
        if mistake := indivisible(hash_tokens, engine.block_tokens):
            raise UsageError(mistake)
        key, formats = (placement.hardware, placement.parallel, engine), experiment.formats_of(engine)
        kv = formats.kv
        if key not in known:
            chip = cost.hardware(placement.hardware, experiment.base_dir)
            drafts = None if engine.speculation is None else engine.speculation.drafts(model, experiment.base_dir)
            model_cost = cost.build(formats, model, chip, placement.parallel, experiment.base_dir, like=engine.like, drafts=drafts)
            blocks = engine.kv_blocks
            if blocks is None:
                tokens = cost.kv_capacity_tokens(
                    model,
                    chip,
                    placement.parallel,
                    engine.hbm_utilization,
                    formats.weights(model),
                    kv,
                    engine.max_batch_tokens,
                    engine.max_seqs,
                    None if drafts is None else drafts.model,
                )
                blocks = tokens // engine.block_tokens
            profiles = cost.profiles(model_cost, engine.max_batch_tokens, engine.max_seqs, blocks * engine.block_tokens)
            known[key] = (model_cost, blocks, profiles)
        model_cost, blocks, profiles = known[key]
        chip = cost.hardware(placement.hardware, experiment.base_dir)
        token_bytes = cost.kv_bytes_per_token(model, chip, kv, placement.parallel)
        ranks = fitting(model, placement.parallel).attention_tp
        overheads = chip.profile.overheads if chip.profile is not None else cost.Overheads(request_s=model_cost.request_s)
        found.append(
            InstancePlan(
                placement=placement,
                cost=model_cost,
                kv_blocks=blocks,
                context_tokens=engine.max_model_len or model.max_positions,
                token_bytes=token_bytes,
                element_bytes=token_bytes / max(1, model.kv_bytes_per_token("fp8", ranks)),
                block_bytes=round(token_bytes * engine.block_tokens),
                ranks=ranks,
                kv_heads=model.main.shared_heads,
                windows=cost.kv_windows(model, chip, kv, placement.parallel) if engine.hybrid_kv else (),
                overheads=overheads,
                profile=chip.profile,
                prefill_profile=profiles[0],
                decode_profile=profiles[1],
            )
        )
    return found
