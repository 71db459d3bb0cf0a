"""What watches a run: a progress bar and TensorBoard logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .loop import Run


class Observer:
    """Called by the loop in the first process only. Nothing here may change what is trained."""

    def on_start(self, run: Run) -> None: ...

    def on_step(self, run: Run, steps: int) -> None: ...

    def on_epoch(self, run: Run) -> None: ...

    def on_end(self, run: Run) -> None: ...


class ProgressBar(Observer):
    """A bar over all steps, with the loss and the last test accuracy; a line an epoch where `lines` is set."""

    def __init__(self, console: Console, *, title: str = "training", lines: bool = True) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console, self.title, self.lines = console, title, lines
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.task: Any = None

    def on_start(self, run: Run) -> None:
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=None, note="")

    def on_step(self, run: Run, steps: int) -> None:
        loss = f"loss {run.losses[-1]:.4f}" if run.losses else ""
        accuracy = f"  test {run.history[-1]['test_accuracy']:.2%}" if run.history else ""
        self.bar.update(
            self.task,
            total=run.options.epochs * steps,
            completed=run.epoch * steps + run.step,
            note=f"epoch {run.epoch + 1}/{run.options.epochs}  {loss}{accuracy}",
        )

    def on_epoch(self, run: Run) -> None:
        if self.lines:
            row = run.history[-1]
            self.console.print(
                f"epoch {run.epoch:>3}/{run.options.epochs}  train loss {row['train_loss']:.4f}  "
                f"test loss {row['test_loss']:.4f}  test accuracy {row['test_accuracy']:.2%}",
                highlight=False,
            )

    def on_end(self, run: Run) -> None:
        self.bar.stop()


class TensorBoard(Observer):
    """Scalars for TensorBoard under OUTPUT/tensorboard. Use `tensorboard_missing` first."""

    def __init__(self) -> None:
        self.writer: Any = None

    def on_start(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # After a resume, what the broken-off run logged beyond the checkpoint is hidden.
        self.writer = SummaryWriter(run.output / "tensorboard", purge_step=run.epoch + 1)

    def on_epoch(self, run: Run) -> None:
        row = run.history[-1]
        for name, tag in (
            ("train_loss", "loss/train"),
            ("test_loss", "loss/test"),
            ("test_accuracy", "accuracy/test"),
            ("lr", "learning_rate"),
        ):
            self.writer.add_scalar(tag, row[name], run.epoch)

    def on_end(self, run: Run) -> None:
        self.writer.close()


def tensorboard_missing() -> str:
    """Why TensorBoard logs cannot be written here; "" where they can."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        return f"TensorBoard is not installed ({error}); `pip install tensorboard` adds the logs"
    return ""
