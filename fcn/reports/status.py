"""What a run is doing, seen from outside: reads its directory and changes nothing there."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from fcn.checkpoints import list_checkpoints
from fcn.distributed import HeartbeatRecord, read_heartbeats
from fcn.errors import InputError
from fcn.metrics import shown
from fcn.text import duration, plural, table
from fcn.tracking import Record, read_foreign

STUCK_S = 60.0
"""A rank that stays at one place this long while others wait is said to hold them up."""


def run_status(folder: Path) -> tuple[str, bool]:
    """(a few lines of text, whether all is well: the run goes on, is finished, or was stopped after saving).

    Raises:
        InputError: the directory is not one of a run.
    """
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: no run is there (no config.yaml); give a directory that training wrote")
    now, here = time.time(), socket.gethostname()
    beats, (records, summary) = read_heartbeats(folder), read_foreign(folder)
    verdict, well = _verdict(beats, summary, now, here)
    lines = [f"{folder}: {verdict}", *_progress(folder, records, beats, now)]
    if beats:
        lines += ["", *_table(beats, now, here)]
    return "\n".join(lines), well


def _verdict(beats: Sequence[HeartbeatRecord], summary: Record, now: float, here: str) -> tuple[str, bool]:
    known = summary.get("status")
    if not beats:
        if known:
            return f"{known} at step {summary['step']}/{summary['steps']}", True
        return "no rank has sent a heartbeat yet", False
    first, place = beats[0], _place(beats[0])
    missing = sorted(set(range(first.world_size)) - {beat.rank for beat in beats})
    over = [beat for beat in beats if beat.state != "running"]
    failed = [beat for beat in over if beat.state.startswith("failed")]
    if failed:
        said = dict.fromkeys(f"rank {beat.rank}: {beat.state.removeprefix('failed: ')}" for beat in failed)
        return f"failed {_ago(max(beat.written for beat in failed), now)}; {'; '.join(list(said)[:4])}", False
    if len(over) == len(beats) and not missing:
        return f"{over[0].state} {_ago(max(beat.written for beat in over), now)}, {place}", True
    gone = [beat for beat in beats if beat.state == "running" and not _is_alive(beat, now, here)]
    if len(gone) == len(beats):
        latest = max(beat.written for beat in beats)
        return f"dead: killed, or its machine is down; the last heartbeat was {_ago(latest, now)}, {place}", False
    if gone or missing:
        lost = [f"rank {beat.rank} on {beat.host} (process {beat.pid})" for beat in gone]
        return f"in trouble: no heartbeat from {', '.join([*lost, *(f'rank {rank}' for rank in missing)][:8])}", False
    holding = [beat for beat in beats if not beat.waiting and beat.since_s > STUCK_S]
    if holding and len(holding) < len(beats):
        names = [f"rank {beat.rank} on {beat.host}, in {beat.place} for {duration(beat.since_s)}" for beat in holding]
        return f"held up by {'; '.join(names[:4])}", False
    return f"running, {place}", True


def _place(beat: HeartbeatRecord) -> str:
    job = f", SLURM job {beat.job}" if beat.job else ""
    return f"{plural(beat.world_size, 'process', 'processes')} by {beat.launcher}{job}"


def _is_alive(beat: HeartbeatRecord, now: float, here: str) -> bool:
    """Whether its heartbeats are on time and, if it runs on this machine, its process exists."""
    if beat.host == here and not _exists(beat.pid):
        return False
    return now - beat.written < 3 * beat.interval_s + 5


def _exists(pid: int) -> bool:
    """Whether a process of this machine is alive; a zombie is not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except (OSError, IndexError):  # another user's process, or no /proc
        return True


def _progress(folder: Path, records: Sequence[Record], beats: Sequence[HeartbeatRecord], now: float) -> list[str]:
    """How far the run is, what it scores, and what a kill would lose."""
    trained = [record for record in records if record["event"] == "train"]
    scored = [record for record in records if record["event"] == "eval"]
    lines = []
    step = max([beat.step for beat in beats] + [record["step"] for record in trained[-1:]], default=0)
    if trained:
        last = trained[-1]
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        parts = [f"  step {step}/{last['steps']}; at step {last['step']}: loss {loss}"]
        parts.append(f"{last['images_per_s']:.1f} images/s")
        parts += [f"data wait {last['data_wait']:.0%}"] if "data_wait" in last else []
        parts += [f"ETA {duration(last['eta_s'])}"] if "eta_s" in last else []
        lines.append(", ".join(parts))
    if scored:
        last = scored[-1]
        best = max(scored, key=lambda record: -1.0 if record["miou"] is None else record["miou"])
        lines.append(f"  mIoU {shown(last['miou'])} on {last['split']} at step {last['step']}")
        if best["miou"] is not None:
            lines[-1] += f"; best {shown(best['miou'])} at step {best['step']}"
    kept = list_checkpoints(folder / "checkpoints")
    if kept:
        saved = int(kept[-1].stem.removeprefix("step_"))
        age, behind = _ago(kept[-1].stat().st_mtime, now), max(0, step - saved)
        lines.append(f"  newest checkpoint: step {saved}, {age}; {behind} steps since then")
    else:
        lines.append("  no checkpoint yet")
    return lines


def _table(beats: Sequence[HeartbeatRecord], now: float, here: str) -> list[str]:
    """One row for each rank."""
    rows = [["rank", "host", "process", "step", "heartbeat", "own s/step", "data s/step", "doing"]]
    for beat in beats:
        times = ("-" if value is None else f"{value:.3g}" for value in (beat.own_s, beat.data_s))
        who = [str(beat.rank), beat.host, str(beat.pid), str(beat.step), _ago(beat.written, now)]
        rows.append([*who, *times, _doing(beat, now, here)])
    return [f"  {line}" for line in table(rows).splitlines()]


def _doing(beat: HeartbeatRecord, now: float, here: str) -> str:
    if beat.state != "running":
        return beat.state
    alive = "" if _is_alive(beat, now, here) else "gone; was in "
    return f"{alive}{beat.place}{', waiting for others' if beat.waiting else ''}"


def _ago(then: float, now: float) -> str:
    return f"{duration(max(0.0, now - then))} ago"
