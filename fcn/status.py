"""What a run is doing, from the outside: its folder is read, and nothing of it is touched."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from fcn.checkpoint import list_checkpoints
from fcn.errors import InputError
from fcn.pulse import Sign, read_signs
from fcn.tracking import Record, duration, read_records, read_summary

STUCK_S = 60.0
"""So long at one place, while others wait, and a rank is said to hold them up."""


def status(folder: Path) -> tuple[str, bool]:
    """(some lines for people, whether all is well: the run goes on, is finished, or has left after saving).

    Raises:
        InputError: the folder is none of a run.
    """
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: no run is there (no config.yaml); give a folder that training made")
    now, here = time.time(), socket.gethostname()
    signs, summary = read_signs(folder), read_summary(folder)
    verdict, well = _verdict(signs, summary, now, here)
    lines = [f"{folder}: {verdict}", *_progress(folder, signs, now)]
    if signs:
        lines += ["", *_table(signs, now, here)]
    return "\n".join(lines), well


def _verdict(signs: Sequence[Sign], summary: Record, now: float, here: str) -> tuple[str, bool]:
    known = summary.get("status")
    if not signs:
        if known:
            return f"{known} at step {summary['step']}/{summary['steps']}", True
        return "no rank has given a sign of life yet", False
    first, place = signs[0], _place(signs[0])
    missing = sorted(set(range(first.world_size)) - {sign.rank for sign in signs})
    over = [sign for sign in signs if sign.state != "running"]
    failed = [sign for sign in over if sign.state.startswith("failed")]
    if failed:
        said = dict.fromkeys(f"rank {sign.rank}: {sign.state.removeprefix('failed: ')}" for sign in failed)
        return f"failed {_ago(max(sign.written for sign in failed), now)}; {'; '.join(list(said)[:4])}", False
    if len(over) == len(signs) and not missing:
        return f"{over[0].state} {_ago(max(sign.written for sign in over), now)}, {place}", True
    gone = [sign for sign in signs if sign.state == "running" and not _is_alive(sign, now, here)]
    if len(gone) == len(signs):
        latest = max(sign.written for sign in signs)
        return f"dead: killed, or its machine is down; the last sign of life was {_ago(latest, now)}, {place}", False
    if gone or missing:
        lost = [f"rank {sign.rank} on {sign.host} (process {sign.pid})" for sign in gone]
        return f"in trouble: no sign of life of {', '.join([*lost, *(f'rank {rank}' for rank in missing)][:8])}", False
    holding = [sign for sign in signs if not sign.waiting and sign.since_s > STUCK_S]
    if holding and len(holding) < len(signs):
        names = [f"rank {sign.rank} on {sign.host}, in {sign.place} for {duration(sign.since_s)}" for sign in holding]
        return f"held up by {'; '.join(names[:4])}", False
    return f"running, {place}", True


def _place(sign: Sign) -> str:
    job = f", SLURM job {sign.job}" if sign.job else ""
    return f"{sign.world_size} process{'es' * (sign.world_size > 1)} by {sign.launcher}{job}"


def _is_alive(sign: Sign, now: float, here: str) -> bool:
    """Whether its signs come in time, and, where that can be seen, its process exists."""
    if sign.host == here and not _exists(sign.pid):
        return False
    return now - sign.written < 3 * sign.interval_s + 5


def _exists(pid: int) -> bool:
    """Whether a process of this machine lives; the dead whom nobody has buried, as in containers, do not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except (OSError, IndexError):  # somebody else's process, or no /proc
        return True


def _progress(folder: Path, signs: Sequence[Sign], now: float) -> list[str]:
    """How far it is, what it scores, and what a kill would lose."""
    records = read_records(folder / "metrics.jsonl")
    trained = [record for record in records if record["event"] == "train"]
    scored = [record for record in records if record["event"] == "eval"]
    lines = []
    step = max([sign.step for sign in signs] + [record["step"] for record in trained[-1:]], default=0)
    if trained:
        last = trained[-1]
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        lines.append(
            f"  step {step}/{last['steps']}; at step {last['step']}: loss {loss}, {last['images_per_s']:.1f} images/s, "
            f"data wait {last['data_wait']:.0%}, ETA {duration(last['eta_s'])}"
        )
    if scored:
        last = scored[-1]
        best = max(scored, key=lambda record: -1.0 if record["miou"] is None else record["miou"])
        found = f"mIoU {_score(last)} on {last['split']} at step {last['step']}"
        lines.append(f"  {found}; best {_score(best)} at step {best['step']}")
    kept = list_checkpoints(folder / "checkpoints")
    if kept:
        saved = int(kept[-1].stem.removeprefix("step_"))
        age, behind = _ago(kept[-1].stat().st_mtime, now), max(0, step - saved)
        lines.append(f"  newest checkpoint: step {saved}, {age}; {behind} steps since then")
    else:
        lines.append("  no checkpoint yet")
    return lines


def _score(record: Record) -> str:
    return "absent" if record["miou"] is None else f"{record['miou']:.4f}"


def _table(signs: Sequence[Sign], now: float, here: str) -> list[str]:
    """One row a rank."""
    head = ["rank", "host", "process", "step", "sign of life", "own s/step", "data s/step", "doing"]
    rows = [
        [
            str(sign.rank), sign.host, str(sign.pid), str(sign.step), _ago(sign.written, now),
            *("-" if value is None else f"{value:.3g}" for value in (sign.own_s, sign.data_s)), _doing(sign, now, here),
        ]
        for sign in signs
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]


def _doing(sign: Sign, now: float, here: str) -> str:
    if sign.state != "running":
        return sign.state
    alive = "" if _is_alive(sign, now, here) else "gone; was in "
    return f"{alive}{sign.place}{', waiting for others' if sign.waiting else ''}"


def _ago(then: float, now: float) -> str:
    return f"{duration(max(0.0, now - then))} ago"
