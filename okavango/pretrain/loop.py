"""The one training loop: pretraining, further pretraining, fine-tuning.

It names no modality, no loss and no model; see "Objective" in the documentation for what it asks of an objective. Everything random
is a pure function of (seed, epoch, index) or (seed, step, rank), so that a run that is killed and started again ends with the same
weights, bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from okavango.data.loading import Batches, batch_loader, derive
from okavango.data.sources import Source
from okavango.files import write_json
from okavango.models.features import to_device
from okavango.models.preprocess import Preprocess
from okavango.pretrain import collectives, state
from okavango.pretrain.optim import Optimiser, clip_gradients, lerp_parameters
from okavango.pretrain.settings import Recipe, Run
from okavango.zoo.checkpoint import save_checkpoint


class RunError(RuntimeError):
    """A run cannot start or go on; one line for the user."""


Evaluator = Callable[[nn.Module], Mapping[str, float]]


def train(
    objective: nn.Module,
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    preprocess: Preprocess,
    accelerator: Any = None,
    evaluators: Mapping[str, Evaluator] | None = None,
    card: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Run or resume a recipe in a run folder.

    Args:
        objective: what is trained; the same weights on every process.
        source: map-style samples.
        recipe: run, optimiser and, for the record, everything else.
        out: run folder; a run that is found there is continued.
        preprocess: of the backbone, for the objective's `transform`.
        accelerator: see `make_accelerator`, made before anything that is random.
        evaluators: name -> function of the exported module, called every `eval_every` steps on the first process.
        card: what the exported checkpoints say of themselves.
        base: `base` and `parent` of `save_checkpoint`, where the export shall hold only what was trained on a frozen network; what
            else the objective has is not exported then.
        say: where lines of progress go, on the first process.

    Returns:
        The run folder. When SIGTERM came, the state is saved and nothing is exported.

    Raises:
        RunError, StateError: bad settings, folder in use, full disk, non-finite loss, too many bad samples.
    """
    out = Path(out)
    accelerator = accelerator or make_accelerator(recipe, out)
    main = accelerator.is_main_process
    say = say if main else lambda line: None
    if recipe.run.precision == "bf16" and accelerator.device.type == "cpu" and emulates_bf16():
        say(
            "--precision bf16: this processor has no instructions for it (AVX512-BF16, AMX) and emulates it, several times slower "
            "than fp32; --precision fp32 is the faster choice here"
        )
    with state.run_lock(out) if main else nullcontext(), _StopSignal() as stop, ExitStack() as ending:
        try:
            return _train(
                objective, source, recipe, out, preprocess, accelerator, evaluators or {}, dict(card or {}), base, say, stop, ending
            )
        except torch.cuda.OutOfMemoryError as error:
            raise RunError(
                f"a batch of {recipe.run.batch} does not fit into the device's memory; lower --batch or raise --accumulate"
            ) from error


def make_accelerator(recipe: Recipe, out: Path):
    """accelerate's process setup, mixed precision and trackers for a recipe."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    run = recipe.run
    if run.precision == "fp16" and not torch.cuda.is_available():
        raise RunError("--precision fp16: needs a GPU, on processors it would silently be fp32; use bf16 or fp32")
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)  # it is a singleton: an earlier run in this process may differ
    if run.threads:
        torch.set_num_threads(run.threads)
    # Which parameters have a gradient depends on the step (subnets, masks), so DDP has to look for the others.
    replicate = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        mixed_precision={"fp32": "no"}.get(run.precision, run.precision),
        log_with=list(run.trackers) or None,
        project_dir=str(out),
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[replicate],
    )


def emulates_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether the processor lacks instructions for bf16 products, so that torch makes them out of fp32 ones.

    Linux lists what a processor can, on all CPUs alike; None where there is no such list.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    abilities = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]  # x86, Arm
    return {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(abilities[0]) if abilities else None


def _train(objective, source, recipe, out, preprocess, accelerator, evaluators, card, base, say, stop, ending) -> Path:
    run, rank, world = recipe.run, accelerator.process_index, accelerator.num_processes
    device, main = accelerator.device, accelerator.is_main_process
    if world > 1 and run.parallel == "fsdp" and getattr(objective, "mine_every", 0):
        raise RunError("--parallel fsdp: this objective chooses its samples with whole weights; use --parallel ddp")
    if run.patience and not evaluators:
        raise RunError("--patience: there is nothing to evaluate this run by; leave it off")
    if run.patience and world > 1 and run.parallel == "fsdp":
        raise RunError("--patience: keeps whole weights; use --parallel ddp")
    template = copy.deepcopy(objective) if run.parallel == "fsdp" and world > 1 and main else None
    objective = objective.to(device)
    model = _distribute(objective, recipe, accelerator)
    optimiser = Optimiser(objective.param_groups(), recipe.optim, run.steps, run.batch)
    optimiser.adamw = accelerator.prepare_optimizer(optimiser.adamw)
    average, best = _Average(objective, recipe.optim.ema), _Best(objective, run)

    start = _resume(objective, optimiser, average, best, recipe, out, accelerator, say)
    batches = Batches(
        _mined(objective, source, start),
        objective.transform(preprocess),
        objective.collate,
        batch=run.batch,
        seed=run.seed,
        rank=rank,
        world=world,
        accumulate=run.accumulate,
    )
    log = _Log(out, recipe, accelerator, start)
    if start == 0:
        _preflight(objective, batches.source, out, run, say)
    clock, bad_seen, absent = _Clock(), 0, Counter[str]()
    steps = start if best.over else run.steps
    loader = ending.enter_context(closing(_batches(objective, source, batches, start, steps, run.workers)))
    objective.train()
    done = start
    totals: dict[str, Tensor] = {}
    for step, micro, batch in clock.waiting(loader):
        bad = batch.pop("bad")
        for name, reason in bad:
            say(f"bad sample {name} at step {step}: {reason}; another one stands in")
        bad_seen += len(bad)
        absent.update(batch.pop("absent", ()))
        batch = to_device(batch, device)
        last = micro == run.accumulate - 1
        no_sync = nullcontext if last else getattr(model, "no_sync", nullcontext)
        with no_sync():
            torch.manual_seed(derive(run.seed, "model", step, rank, micro))
            with accelerator.autocast():
                losses = model(batch, step)
            if collectives.any_rank(not bool(torch.isfinite(losses["loss"])), device):
                _save_for_replay(out, objective, batch, step, micro, rank, recipe, losses)
            accelerator.backward(losses["loss"] / run.accumulate)
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.detach().float() / run.accumulate
        if not last:
            continue

        schedule = optimiser.schedule(step)
        accelerator.unscale_gradients(optimiser.adamw)
        norms = clip_gradients(objective.clip_groups(), recipe.optim.clip)
        if run.precision != "fp16" and collectives.any_rank(not all(bool(torch.isfinite(norm)) for norm in norms), device):
            _save_for_replay(out, objective, batch, step, micro, rank, recipe, {f"norm{i}": norm for i, norm in enumerate(norms)})
        optimiser.adamw.step()
        optimiser.adamw.zero_grad(set_to_none=True)
        objective.after_step(step)
        average.update()
        done = step + 1

        clock.count(run.batch)
        if done % run.log_every == 0 or done == run.steps:
            means = {name: float(collectives.mean_over_ranks(value)) for name, value in totals.items()}
            norms_named = {f"grad_norm_{i}": float(_full(norm)) for i, norm in enumerate(norms)}
            log.write(step, {**means, **norms_named, **schedule, **clock.rates(), "bad_samples": bad_seen}, run.steps, say)
        totals = {}
        _check_bad(bad_seen, (done - start) * run.batch // world, run.bad_share, first=step == start)
        if done == 1:
            _first_step(say)
        if main and step == start:  # settings that may change when a run is resumed stand there as they are now
            write_json(out / "recipe.json", dataclasses.asdict(recipe))
        if evaluators and run.eval_every and done % run.eval_every == 0 and (done < run.steps or run.patience):
            with clock.paused(), average.applied() if run.patience else nullcontext():
                results = _evaluate(_whole(objective, template, main), evaluators, main)
                log.write(step, results, run.steps, say)
                best.update(results, done, main, device)
        stopping = collectives.any_rank(stop.wanted(), device)
        if done % run.save_every == 0 or done == run.steps or stopping or best.over:
            with clock.paused():
                _save(objective, optimiser, average, best, recipe, out, done, world, accelerator)
        if best.over:
            say(f"no better result in {run.patience} evaluations: the run ends at step {done} of {run.steps}")
            break
        if stopping and done < run.steps:
            say(f"stopped at step {done} of {run.steps}; the same command goes on from there")
            break
    if absent:
        counts = ", ".join(f"{part} in {count}" for part, count in sorted(absent.items()))
        say(f"of {(done - start) * run.batch // world} samples that were seen: {counts}")
    if done == run.steps or best.over:
        if best.step:
            say(f"the weights of step {best.step} are exported, the best ones")
        with best.applied() if best.step else average.applied():
            _export(_whole(objective, template, main), out, recipe, card, base, main)
        if main:
            learning_curves(out / "log.jsonl", out / "curves.png")
            if hasattr(objective, "after_run"):
                objective.after_run(out)
    accelerator.wait_for_everyone()  # the first process may still be writing
    log.close()
    return out


# -- setting up -----------------------------------------------------------------------------------------------------------


def _distribute(objective: nn.Module, recipe: Recipe, accelerator) -> nn.Module:
    """Wrap for several processes: DDP, or FSDP2 with the objective as one unit.

    One unit, because ranks may run different subnets: sharding block by block would have them wait for each other's blocks.
    """
    if accelerator.num_processes == 1:
        return objective
    if recipe.run.parallel == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(objective, mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)))
        return objective
    return accelerator.prepare_model(objective)


class _Average:
    """The loop's exponential moving average of all trained parameters; does nothing at momentum 0."""

    def __init__(self, objective: nn.Module, momentum: float):
        self.momentum = momentum
        self.current = {name: p for name, p in objective.named_parameters() if p.requires_grad} if momentum else {}
        self.mean = {name: parameter.detach().clone() for name, parameter in self.current.items()}

    def update(self) -> None:
        if self.momentum:
            lerp_parameters(self.mean.values(), self.current.values(), self.momentum)

    def applied(self):
        """Averaged weights in place of the trained ones, for a while."""
        return _exchanged(self.current, self.mean)


class _Best:
    """What is trained, and the buffers, as they were at the best evaluation; does nothing without patience.

    Attributes:
        step: after which that was, 0 before the first; value: its result, on the first process.
        waited: evaluations since then; over: whether patience has run out.
    """

    def __init__(self, objective: nn.Module, run: Run):
        self.patience, self.watch = run.patience, run.watch
        trained = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
        self.current: dict[str, Tensor] = {**trained, **dict(objective.named_buffers())} if run.patience else {}
        self.kept = {name: tensor.detach().clone() for name, tensor in self.current.items()}
        self.value, self.step, self.waited = -math.inf, 0, 0

    @property
    def over(self) -> bool:
        return bool(self.patience) and self.waited >= self.patience

    def update(self, results: Mapping[str, float], step: int, main: bool, device: torch.device) -> None:
        if not self.patience:
            return
        if main and self.watch not in ("", *results):
            raise RunError(f"--watch {self.watch}: no such result; expected one of {', '.join(results)}")
        value = results[self.watch or next(iter(results))] if main else -math.inf
        self.waited += 1
        if collectives.any_rank(main and value > self.value, device):
            self.value, self.step, self.waited = value, step, 0
            for name, tensor in self.current.items():
                self.kept[name].copy_(tensor.detach())

    def applied(self):
        """Those weights in place of the last ones, for a while."""
        return _exchanged(self.current, self.kept)


@contextmanager
def _exchanged(current: Mapping[str, Tensor], others: Mapping[str, Tensor]):
    """Other values in tensors of the same names, and their own again afterwards."""
    own = {name: tensor.detach().clone() for name, tensor in current.items()}
    for name, tensor in current.items():
        tensor.data.copy_(others[name])
    try:
        yield
    finally:
        for name, tensor in current.items():
            tensor.data.copy_(own[name])


def _resume(objective, optimiser, average, best, recipe: Recipe, out: Path, accelerator, say) -> int:
    """Put back the newest intact state; returns the step to go on from."""
    found, problems = state.latest_state(out / "state")
    for problem in problems:
        say(problem)
    if found is None:
        if problems:
            raise RunError(f"no state in {out / 'state'} is intact; remove the folder to start from scratch")
        state.cut_log(out / "log.jsonl", 0)
        return 0
    here = environment(accelerator.num_processes)
    for key, value in found.meta["environment"].items():
        if here.get(key) != value:
            say(f"resuming with {key} {here.get(key)}, the state was written with {value}: the result may differ in the last bits")
    if changed := ", ".join(_differences(found.meta["recipe"], recipe)):
        raise RunError(f"{out} holds a run with another recipe ({changed} differ); choose another --out or repeat the old settings")
    with torch.no_grad():
        _load_into(objective.state_dict(), found.tensors("objective"))
        if average.mean:
            _load_into(average.mean, found.tensors("ema"))
        if best.patience and "best" in found.meta:
            _load_into(best.kept, found.tensors("best"))
            best.value, best.step, best.waited = found.meta["best"]
    optimiser.load_state_tensors(found.tensors("optimiser"))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(found.meta["gradient_scaler"])
    state.cut_log(out / "log.jsonl", found.step)
    if found.step < recipe.run.steps:
        say(f"resuming at step {found.step} of {recipe.run.steps}")
    return found.step


def _essence(recipe: Recipe) -> dict:
    """The part of a recipe that decides the result; the rest may change when a run is resumed."""
    whole = dataclasses.asdict(recipe)
    stopping = ("patience", "watch", "eval_every") if recipe.run.patience else ("patience",)
    whole["run"] = {key: whole["run"][key] for key in ("steps", "batch", "seed", "accumulate", "precision", *stopping)}
    return whole


def _differences(was: dict, now: Any, prefix: str = "") -> list[str]:
    """Dotted names of settings that differ. What an older state does not know had its default, or did not decide the result."""
    names = [prefix + name for name in was if name not in {field.name for field in dataclasses.fields(now)}]
    for field in dataclasses.fields(now):
        value = getattr(now, field.name)
        if dataclasses.is_dataclass(value):
            names += _differences(was.get(field.name, {}), value, f"{prefix}{field.name}.")
        elif field.name in was:
            if was[field.name] != json.loads(json.dumps(value)):
                names.append(prefix + field.name)
        elif not isinstance(now, Run) and field.default is not dataclasses.MISSING and value != field.default:
            names.append(prefix + field.name)
    return names


def _load_into(targets: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if set(targets) != set(tensors):
        odd = sorted(set(targets) ^ set(tensors))[0]
        raise RunError(f"the state does not fit the model: {odd} stands on one side only; was the recipe changed?")
    for name, target in targets.items():
        value = tensors[name].to(target.device)
        if hasattr(target, "placements"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, target.device_mesh, target.placements)
        target.copy_(value)


def environment(world: int) -> dict[str, Any]:
    """What a bit-for-bit resume depends on."""
    import platform

    return {
        "processes": world,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


# -- preflight ------------------------------------------------------------------------------------------------------------


def _preflight(objective, source: Source, out: Path, run: Run, say) -> None:
    """Space for the states and a folder that can be written; the first step, which `_first_step` looks at, tries the rest.

    Raises:
        RunError: with one line per problem.
    """
    problems: list[str] = []
    out.mkdir(parents=True, exist_ok=True)  # the first process may not have come so far
    parameters = sum(p.numel() for p in objective.parameters())
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    need = 4 * (parameters + 2 * trained) * (run.keep + 1) + 8 * parameters
    free = shutil.disk_usage(out).free
    if free < need:
        problems.append(f"{out} has {free / 2**20:.0f} MiB free, states and exports need about {need / 2**20:.0f} MiB")
    try:
        probe = out / f".write-{os.getpid()}"
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        problems.append(f"{out} cannot be written: {error}")
    if problems:
        raise RunError("preflight failed:\n" + "\n".join(problems))
    say(
        f"{parameters / 1e6:.2f} M parameters ({trained / 1e6:.2f} M trained), {len(source)} samples, "
        f"states take about {need / 2**20:.0f} MiB"
    )


def _first_step(say) -> None:
    """Say what a step takes; a run that would swap or be killed later stops now.

    Raises:
        RunError: memory is nearly full.
    """
    peak, total = _peak_memory(), _total_memory()
    if peak > 0.9 * total:
        raise RunError(f"the first step took {peak / 2**30:.1f} GiB of {total / 2**30:.1f} GiB of memory; lower --batch")
    say(f"the first step passed, peak memory {peak / 2**20:.0f} MiB")


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _total_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# -- data -----------------------------------------------------------------------------------------------------------------


def _mined(objective, source: Source, step: int) -> Source:
    """What the next steps see: the source, or what the objective makes of it, chosen anew at multiples of its `mine_every`."""
    every = getattr(objective, "mine_every", 0)
    if every and step % every == 0:
        objective.mine(source, step)
    return objective.samples(source) if hasattr(objective, "samples") else source


def _batches(objective, source: Source, batches: Batches, start: int, steps: int, workers: int):
    """(step, micro, batch) of the steps start .. steps - 1; the loader is started anew with each new choice of the objective."""
    every = getattr(objective, "mine_every", 0) or max(1, steps)
    for first in range(start - start % every, steps, every):
        if first > start:
            batches.source = _mined(objective, source, first)
        with closing(batch_loader(batches, max(first, start), min(first + every, steps), workers=workers)) as loader:
            yield from loader


# -- while it runs --------------------------------------------------------------------------------------------------------


class _StopSignal:
    """SIGTERM, or the death of the launcher that started this process, asks for a stop at the end of the step."""

    def __init__(self) -> None:
        self.flag = False
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> _StopSignal:
        try:
            self.before = signal.signal(signal.SIGTERM, self._raise_flag)
        except ValueError:  # not the main thread: whoever runs us handles signals
            self.before = None
        return self

    def _raise_flag(self, *_) -> None:
        self.flag = True

    def wanted(self) -> bool:
        return self.flag or (self.launcher is not None and os.getppid() != self.launcher)

    def __exit__(self, *_) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)


class _Clock:
    """Samples per second and the share of time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.start, self.waited, self.samples = time.perf_counter(), 0.0, 0

    def waiting(self, loader):
        iterator = iter(loader)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield item

    def count(self, samples: int) -> None:
        self.samples += samples

    @contextmanager
    def paused(self):
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before

    def rates(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        rates = {"samples_per_second": self.samples / elapsed, "data_wait": min(1.0, self.waited / elapsed)}
        self.reset()
        return rates


class _Log:
    """log.jsonl, accelerate's trackers and the line that a person reads."""

    def __init__(self, out: Path, recipe: Recipe, accelerator, start: int):
        self.path, self.accelerator, self.main = out / "log.jsonl", accelerator, accelerator.is_main_process
        if recipe.run.trackers:
            accelerator.init_trackers("tensorboard" if recipe.run.trackers == ("tensorboard",) else recipe.name)
        self.begun, self.first = time.perf_counter(), start

    def write(self, step: int, values: Mapping[str, float], steps: int, say) -> None:
        if not self.main:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(dict(values), step=step)
        if "samples_per_second" not in values:
            say(f"step {step + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
            return
        left = (time.perf_counter() - self.begun) / max(1, step + 1 - self.first) * (steps - step - 1)
        say(
            f"step {step + 1}/{steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"{values['samples_per_second']:.1f} samples/s  data wait {100 * values['data_wait']:.0f} %  "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )

    def close(self) -> None:
        self.accelerator.end_training()


def _evaluate(objective, evaluators: Mapping[str, Evaluator], main: bool) -> dict[str, float]:
    """Results of all evaluators on the exported module, on the first process; the others wait at the next collective."""
    if not main:
        return {}
    results: dict[str, float] = {}
    for name, evaluate in evaluators.items():
        for exported, (module, _) in objective.exports().items():
            training = module.training
            module.eval()
            results.update({f"{exported}_{name}_{key}": value for key, value in evaluate(module).items()})
            module.train(training)
    return results


def _check_bad(bad: int, seen: int, share: float, first: bool) -> None:
    """Few samples say little of a share, but more than one bad sample in the first batch are no accident.

    Raises:
        RunError: too many samples cannot be read.
    """
    if bad > share * seen and (seen >= 100 or (first and bad > 1)):
        raise RunError(
            f"{bad} of {seen} samples could not be read, more than the share of {share:g} that --bad-share allows; "
            "the lines above name them"
        )


def _save_for_replay(out: Path, objective, batch, step: int, micro: int, rank: int, recipe: Recipe, values) -> None:
    """Keep what is needed to run a step again, and stop.

    Raises:
        RunError: always.
    """
    from safetensors.torch import save_file

    folder = out / f"not-finite-step-{step}-rank-{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: _full(tensor).detach().cpu().clone() for name, tensor in objective.state_dict().items()}
    tensors = {name: value.cpu().contiguous() for name, value in batch.items() if isinstance(value, Tensor)}
    save_file(weights, folder / "objective.safetensors")
    save_file(tensors, folder / "batch.safetensors")
    shown = {name: float(_full(value.detach())) for name, value in values.items()}
    seed = derive(recipe.run.seed, "model", step, rank, micro)
    where = {"step": step, "micro": micro, "rank": rank, "seed": seed}
    write_json(folder / "meta.json", {**where, "values": {name: str(value) for name, value in shown.items()}})
    bad = ", ".join(name for name, value in shown.items() if not math.isfinite(value)) or "another process"
    raise RunError(
        f"step {step}: not finite: {bad}; batch, weights and seed are in {folder} "
        "(okavango.pretrain.loop.replay runs it again); lower --optim.lr or look at the data"
    )


def replay(objective: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Run again the step that a run stopped at because something was not finite; returns its losses."""
    from safetensors.torch import load_file

    meta = json.loads((Path(folder) / "meta.json").read_text())
    objective.load_state_dict(load_file(Path(folder) / "objective.safetensors"))
    objective.train()
    torch.manual_seed(meta["seed"])
    return objective(load_file(Path(folder) / "batch.safetensors"), meta["step"])


# -- saving ---------------------------------------------------------------------------------------------------------------


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _save(objective, optimiser, average, best, recipe, out: Path, done: int, world: int, accelerator) -> None:
    parts = {"objective": objective.state_dict(), "optimiser": optimiser.state_tensors()}
    if average.mean:
        parts["ema"] = average.mean
    if best.patience:
        parts["best"] = best.kept
    # Sharded tensors are put together on every rank, the first writes.
    parts = {part: {name: _full(tensor) for name, tensor in tensors.items()} for part, tensors in parts.items()}
    failed = ""
    if accelerator.is_main_process:
        meta: dict[str, Any] = {"environment": environment(world), "recipe": _essence(recipe)}
        if best.patience:
            meta["best"] = (best.value, best.step, best.waited)
        if accelerator.scaler is not None:
            meta["gradient_scaler"] = accelerator.scaler.state_dict()
        try:
            state.save_state(out / "state", done, parts, meta, keep=recipe.run.keep)
        except state.StateError as error:
            failed = str(error)
    if collectives.any_rank(bool(failed), accelerator.device):
        raise RunError(failed or "the first process could not write the state")


def _whole(objective: nn.Module, template: nn.Module | None, main: bool) -> nn.Module:
    """The objective itself, or, when it is sharded, an unsharded copy on the first process."""
    if not any(hasattr(parameter, "full_tensor") for parameter in objective.parameters()):
        return objective
    tensors = {name: _full(tensor).cpu() for name, tensor in objective.state_dict().items()}  # every rank takes part
    if main and template is not None:
        template.load_state_dict(tensors)
        return template
    return objective


def _export(objective, out: Path, recipe: Recipe, card: dict, base: Mapping[str, Any] | None, main: bool) -> None:
    """Checkpoints of what was made: `export/` (one folder per export when there are several); without a base, `export-full/`."""
    if not main:
        return
    exports = objective.exports()
    common = {"recipe": recipe.name, "seed": recipe.run.seed, "steps": recipe.run.steps, "batch": recipe.run.batch, **card}
    for name, (module, own) in exports.items():
        folder = out / "export" if len(exports) == 1 else out / "export" / name
        head = module.head_config() if hasattr(module, "head_config") else None
        prefix = module.backbone_prefix if head else ""
        kind = "head" if head else "backbone"
        save_checkpoint(module, folder, kind=kind, head=head, backbone_prefix=prefix, card={**common, **own}, **(base or {}))
    if base is None:
        head = objective.head_config() if hasattr(objective, "head_config") else None
        save_checkpoint(
            objective, out / "export-full", kind="objective", head=head, card=common, backbone_prefix=objective.backbone_prefix
        )


def learning_curves(log: Path, picture: Path) -> None:
    """Draw every logged quantity against the step, one panel each, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without pyplot, which takes half a second to import
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[int, float]]] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        step = entry.pop("step")
        for name, value in entry.items():
            series.setdefault(name, []).append((step, value))
    columns = 3
    rows = max(1, math.ceil(len(series) / columns))
    width, height = 4 * columns, 2.4 * rows
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    # Room in inches for titles and ticks: a layout that measures every label takes longer than the drawing.
    figure.subplots_adjust(0.5 / width, 0.3 / height, 1 - 0.1 / width, 1 - 0.3 / height, wspace=0.22, hspace=0.35)
    for number, (name, points) in enumerate(series.items()):
        axis = figure.add_subplot(rows, columns, number + 1)
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
