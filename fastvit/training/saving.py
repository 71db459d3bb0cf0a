"""What the checkpoints of a run hold, and how a run comes back from one.

A run whose model is whole in each process has files, last.pt and best.pt, one in shards has folders, epoch-0001 and so
on. Either kind can be resumed from the other's, on any number of processes.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastvit.checkpoints.errors import CheckpointError
from fastvit.checkpoints.files import RUN
from fastvit.checkpoints.sharded import is_sharded_folder, load_into, read_metadata, shapes_in
from fastvit.files import written_whole

from .checkpoint import check_weights, load_checkpoint, save_checkpoint
from .options import TrainOptions
from .run import Run
from .shard_writer import folder_name, folders_in

LAST, BEST, METRICS = "last.pt", "best.pt", "metrics.jsonl"


def save(run: Run, *, is_best: bool = False) -> None:
    """Write a checkpoint and metrics.jsonl. Every process must call."""
    note = _note(run)
    states = _states()
    model, optimizer = states.get_state_dict(run.model, run.optimizer, options=_options(run))
    note["groups"] = optimizer["param_groups"]
    tensors = {"model": model, "optimizer": optimizer["state"], **_average(run)}
    if run.writer is not None:
        run.writer.save(folder_name(run.epoch, run.step), note, tensors, best=folder_name(run.best_epoch, 0))
    elif run.team.is_first:
        for name in (BEST, LAST) if is_best else (LAST,):
            save_checkpoint(run.output / name, {**note, **tensors})
    if run.team.is_first:
        with written_whole(run.output / METRICS) as fresh:
            fresh.write_text("".join(json.dumps(row) + "\n" for row in run.history), encoding="utf-8")
    run.team.wait()


def _average(run: Run) -> dict[str, Any]:
    """What a checkpoint has of it; `load_pretrained` takes it rather than the model, unless it is told which."""
    return {"ema": run.ema.values} if run.ema else {}


def _states() -> ModuleType:
    """Of torch.distributed; its import takes seconds, which a bad option would wait for."""
    from torch.distributed.checkpoint import state_dict

    return state_dict


def _options(run: Run) -> Any:
    return _states().StateDictOptions(full_state_dict=run.writer is None)


def _note(run: Run) -> dict[str, Any]:
    """All that is no tensor of the model, as the first process has it."""
    device = run.team.device
    # The sum of losses is each process's own: all are stored, so that the mean of the epoch comes out the same.
    own: dict[str, Any] = {"torch": torch.get_rng_state(), "epoch_loss": run.epoch_loss}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    return {
        "options": asdict(run.options),
        "data": {"fingerprint": run.data.fingerprint, "classes": list(run.data.classes)},
        "config": {"fastvit": _plain(run.arguments)},
        "scaler": run.scaler.state_dict(),
        "epoch": run.epoch,
        "step": run.step,
        "planned_world": run.planned_world,
        "processes": run.team.gather(own),
        "history": run.history,
        "ema_updates": run.ema.updates if run.ema else 0,
    }


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """What `load_pretrained` can't see in the tensors, such as the number of heads. It sees classes of layers there."""
    held = {name: value for name, value in arguments.items() if isinstance(value, (int, float, str, tuple))}
    return {name: value for name, value in held.items() if name != "drop_path_rate"}


def restore(run: Run, contents: dict[str, Any]) -> None:
    """Put the state of a checkpoint into a run that `start` made from the checkpoint's options. Every process must
    call."""
    stored = contents["data"]
    if stored["fingerprint"] != run.data.fingerprint:
        raise CheckpointError(
            f"--resume: the images of {run.options.data} are not those the checkpoint was trained on "
            f"({len(stored['classes'])} classes then, {len(run.data.classes)} now, or other files)"
        )
    try:
        _restore_tensors(run, contents)
        if contents["scaler"]:
            run.scaler.load_state_dict(contents["scaler"])
        if run.ema:
            run.ema.updates = int(contents["ema_updates"])
        run.epoch, run.step = int(contents["epoch"]), int(contents["step"])
        run.planned_world = int(contents["planned_world"])
        run.history = [dict(row) for row in contents["history"]]
        _restore_process(run, contents["processes"])
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"--resume: the state in the checkpoint does not fit the run ({error})") from error


def _restore_tensors(run: Run, contents: dict[str, Any]) -> None:
    folder = contents.get("folder")
    states = _states()
    if folder is None:
        check_weights(run.model, contents["model"], "--resume")
        model, optimizer = contents["model"], {"state": contents["optimizer"], "param_groups": contents["groups"]}
        has_stepped = bool(contents["optimizer"])
        options = states.StateDictOptions(full_state_dict=True)
    else:
        options = _options(run)
        model, optimizer = states.get_state_dict(run.model, run.optimizer, options=options)
        metadata = read_metadata(Path(folder))
        has_stepped = any(name.startswith("optimizer.") for name in shapes_in(metadata))
        state = {"optimizer": optimizer["state"]} if has_stepped else {}
        load_into(Path(folder), {"model": model, **state, **_average(run)}, metadata)
        optimizer = {**optimizer, "param_groups": contents["groups"]}
    if run.ema and folder is None:
        with run.ema.in_place_of(run.model):
            states.set_model_state_dict(run.model, contents["ema"], options=options)
    states.set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options)
    if not has_stepped:  # the scaler has skipped every step so far, where torch takes one to have states
        run.optimizer.state.clear()


def _restore_process(run: Run, processes: list[dict[str, Any]]) -> None:
    """The running sum, and random numbers where the run has as many processes as the checkpoint's had."""
    run.epoch_loss = sum(float(one["epoch_loss"]) for one in processes) / len(processes)
    if len(processes) != run.team.world:
        return  # dropout and stochastic depth draw from the seeds of a new run
    own = processes[run.team.rank]
    run.epoch_loss = float(own["epoch_loss"])
    torch.set_rng_state(own["torch"])
    if run.team.device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], run.team.device)


def last_of(output: str | Path) -> Path | None:
    """The checkpoint in a run's folder that has come furthest, a file or a folder; None where there is none."""
    return next(iter(_newest_first(Path(output))), None)


def _newest_first(output: Path) -> list[Path]:
    """The checkpoints in a run's folder. A file that can't be read comes last, where there are folders."""
    folders = folders_in(output)[::-1]
    file = output / LAST
    if not file.exists() or not folders:
        return [file] if file.exists() else folders
    try:
        is_ahead = _place(load_checkpoint(file)) >= _place(load_checkpoint(folders[0] / RUN))
    except CheckpointError:
        is_ahead = False
    return [file, *folders] if is_ahead else [*folders, file]


def is_of(contents: dict[str, Any], output: str) -> bool:
    """Whether a checkpoint that is resumed from lies in this folder, where the run goes on."""
    return Path(output).resolve() == Path(contents["output"])


def progress_of(contents: dict[str, Any] | None) -> dict[str, int]:
    """Where a run begins that resumes from a checkpoint's contents."""
    epoch, step = _place(contents) if contents else (0, 0)
    return {"epoch": epoch, "step": step}


def _place(contents: dict[str, Any]) -> tuple[int, int]:
    return int(contents["epoch"]), int(contents["step"])


def load_note(path: Path) -> dict[str, Any]:
    """What a checkpoint holds: of a file all of it, of shards all but their tensors, and under "folder" where they are.

    Raises:
        CheckpointError: neither, not whole, or damaged.
    """
    if not path.is_dir():
        return load_checkpoint(path)
    if not is_sharded_folder(path):
        inside = last_of(path)
        if inside is None:
            raise CheckpointError(f"{path}: no checkpoint in this folder; accepted are last.pt, epoch-0001 and so on")
        return load_note(inside)
    read_metadata(path)
    return {**load_checkpoint(path / RUN), "folder": str(path.resolve())}


def resume_options(path: str | Path, given: dict[str, Any]) -> tuple[TrainOptions, dict[str, Any]]:
    """The options and contents of the checkpoint at `path`, with what was `given` on top.

    The run goes on writing where the checkpoint lies, unless `given` names another output.

    Args:
        path: a file or folder that a run wrote, or the run's own folder, whose last one is taken.
    """
    return _resumed(Path(path), load_note(Path(path)), given)


def _resumed(path: Path, contents: dict[str, Any], given: dict[str, Any]) -> tuple[TrainOptions, dict[str, Any]]:
    is_run_s = path.is_dir() and not is_sharded_folder(path)
    contents["output"] = str((path if is_run_s else path.parent).resolve())
    stored = TrainOptions(**{**contents["options"], "output": contents["output"]})
    options = stored.resumed_with(given)
    if contents["epoch"] >= options.epochs:
        raise CompleteError(f"{path}: this run is complete ({options.epochs} epochs); nothing is left to do")
    return options, contents


def begin_or_resume(given: dict[str, Any], resumed: str | None) -> tuple[TrainOptions, dict[str, Any] | None]:
    """The options of a run, and the contents of the checkpoint that it goes on from.

    Args:
        given: options by name.
        resumed: as of `resume_options`; None: begin; "auto": the last checkpoint of the output, or begin.
    """
    if resumed == "auto":
        found = _last_whole(Path(given.get("output", TrainOptions.output)))
        if found is not None:
            return _resumed(*found, {name: value for name, value in given.items() if name != "output"})
    if resumed is None or resumed == "auto":
        return TrainOptions(**given), None
    return resume_options(resumed, given)


def _last_whole(output: Path) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint of `output` that is not damaged, and its contents; None where there is none at all."""
    damage: list[CheckpointError] = []
    for path in _newest_first(output):
        try:
            contents = load_note(path)
        except CheckpointError as error:
            damage.append(error)
            continue
        for passed in damage:
            warnings.warn(f"passed over: {passed}", stacklevel=2)
        return path, contents
    if damage:
        raise damage[0]
    return None


class CompleteError(CheckpointError):
    """Of a run that has come to its end."""
