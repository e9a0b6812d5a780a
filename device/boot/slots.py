"""The slots of a board's releases: count the boots of one on trial, keep one that is healthy, go back from one that is not.

systemd runs it as root with the system's own Python, so that it works whatever the current release is: the standard library only.

    /opt/copresence/current → releases/…       what the units run
    /opt/copresence/good    → releases/…       what was confirmed last; what a bad release goes back to
    /opt/copresence/trial.json                 the boots in which an unconfirmed release was started
    /opt/copresence/rolled-back.json           from what to what, why and when; until a release is confirmed
    /run/copresence/status.json                what the running companion says of itself, every second

`trial` comes before every start. A release that was started in three boots and never confirmed takes the board down with it, or keeps
it from its five minutes: it is given up before it is started a fourth time. `confirm` waits for five healthy minutes, `rollback` is what
systemd calls when the budget of restarts is spent or `confirm` gave up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path("/opt/copresence")
STATE = Path("/var/lib/copresence")
STATUS = Path("/run/copresence/status.json")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

HEALTHY_S = 300.0  # so long without a break: the ring of present layers (a minute) has gone round, and the board is warm
PATIENCE_S = 900.0  # three attempts at that
POLL_S = 1.0  # the companion's own period
STALE_NS = 5_000_000_000  # a status so old is nobody's: the watchdog's time
TRIAL_BOOTS = 3  # as many as the microcontroller resets the board within an hour
RETRY_S = 60.0  # with nothing to go back to: the fault may be a device that is being exchanged

CRITICAL, WARNING, NOTICE, INFO = 2, 4, 5, 6  # <syslog.h>


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is 1 if `confirm` gave up, or what it should do cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("trial", help="count this boot against a release that is not confirmed; give it up after three")
    commands.add_parser("confirm", help="wait for five healthy minutes of the current release, and mark it as good")
    commands.add_parser("rollback", help="go back to the last good release, and start it")
    arguments = parser.parse_args(argv)
    try:
        return {"trial": trial, "confirm": confirm, "rollback": rollback}[arguments.command]()
    except OSError as error:
        say(CRITICAL, "slots_failed", command=arguments.command, reason=str(error), remedy=f"make {ROOT} writable for root")
        return 1


def trial() -> int:
    """Count this boot, once; 0 whatever becomes of it, for the companion is to be started in any case."""
    name = name_of("current")
    if not name or name == name_of("good"):
        return 0
    known = _read(ROOT / "trial.json")
    boots = known.get("boots", []) if known.get("release") == name else []
    boot = BOOT_ID.read_text(encoding="ascii").strip()
    if boot in boots:
        return 0
    if len(boots) >= TRIAL_BOOTS and give_up(f"started in {len(boots)} boots and never confirmed"):
        return 0
    with contextlib.suppress(OSError):  # a root that cannot be written has been switched by somebody who can
        write(ROOT / "trial.json", {"release": name, "boots": [*boots, boot][-TRIAL_BOOTS - 1 :]})
    say(NOTICE, "trial", release=name, boots=len(boots) + 1, of=TRIAL_BOOTS)
    return 0


def confirm(now_s: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> int:
    """Wait until the current release has been healthy for long enough, and mark it as good; 1 if it never was."""
    name, begun_s, healthy_since_s, reason = "", 0.0, None, "it never was ready"
    while True:
        at_s, current = now_s(), name_of("current")
        if current != name:  # another one was flashed meanwhile: its time begins now
            name, begun_s, healthy_since_s = current, at_s, None
        if name == name_of("good"):
            return 0
        sick = ailment(name)
        if sick:
            if healthy_since_s is not None:
                say(WARNING, "unhealthy", release=name, reason=sick)
            reason, healthy_since_s = sick, None
        elif healthy_since_s is None:
            healthy_since_s = at_s
        if healthy_since_s is not None and at_s - healthy_since_s >= HEALTHY_S:
            try:
                point("good", ROOT / "releases" / name)
                for left in ("trial.json", "rolled-back.json"):
                    (ROOT / left).unlink(missing_ok=True)
            except OSError as error:  # no reason to stop a healthy companion
                say(CRITICAL, "not_kept", release=name, reason=str(error), remedy=f"make {ROOT} writable for root")
            else:
                say(NOTICE, "good", release=name, healthy_s=round(at_s - healthy_since_s))
            return 0
        if at_s - begun_s >= PATIENCE_S:
            say(CRITICAL, "not_confirmed", release=name, reason=reason, after_s=round(at_s - begun_s))
            return 1
        sleep(POLL_S)


def ailment(release: str) -> str:
    """What keeps the companion from being healthy just now; empty if nothing does."""
    status = _read(STATUS)
    if not status:
        return "it does not run"
    if time.monotonic_ns() - int(status.get("at_ns", 0)) > STALE_NS:
        return "it does not tick"
    if status.get("release") != release:
        return f"another release runs: {status.get('release')}"
    health = status.get("health", {})
    sick = [name for name, well in health.items() if not well]
    return f"not well: {', '.join(sick)}" if sick or not health else ""


def rollback(sleep: Callable[[float], None] = time.sleep) -> int:
    """Go back to the last good release where there is another one, and start; otherwise start the same again after a while."""
    try:
        went_back = give_up("its restarts are spent, its engine cannot be had, or it was never confirmed")
    except OSError as error:
        say(CRITICAL, "rollback_failed", reason=str(error), remedy=f"make {ROOT} writable for root")
        went_back = False
    if not went_back:
        say(CRITICAL, "nothing_to_go_back_to", release=name_of("current"), retry_s=RETRY_S, remedy="copresence doctor")
        sleep(RETRY_S)
    units = ("copresence-engine.service", "copresence.service")
    subprocess.run(["systemctl", "reset-failed", *units], check=False)
    # Not waited for: this is a job of systemd's itself.
    return subprocess.run(["systemctl", "restart", "--no-block", "copresence.service"], check=False).returncode


def give_up(why: str) -> bool:
    """Let `current` lead to the last good release; False if there is no other one."""
    bad, good = name_of("current"), name_of("good")
    target = ROOT / "releases" / good
    if not good or good == bad or not target.is_dir():
        return False
    point("current", target)
    say(CRITICAL, "rolled_back", release=bad, to=good, reason=why)
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write(ROOT / "rolled-back.json", {"from": bad, "to": good, "reason": why, "at": at})
    (ROOT / "trial.json").unlink(missing_ok=True)
    _permit_bundle(target)
    return True


def _permit_bundle(release: Path) -> None:
    """A board refuses bundles older than the one that ran last (device/signature.py); this return to an older one is meant."""
    memory = STATE / "bundle-version"
    version = _read(release / "bundle" / "manifest.json").get("version", 0)
    try:
        if type(version) is int and 0 < version < int(memory.read_text(encoding="ascii")):
            owner = memory.stat()
            write(memory, version)
            os.chown(memory, owner.st_uid, owner.st_gid, follow_symlinks=False)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        say(CRITICAL, "bundle_version", reason=str(error), remedy=f"delete {memory}, or the older bundle will be refused")


def point(link: str, target: Path) -> None:
    """Let a link in ROOT lead to `target` in one step that outlives a power cut."""
    scratch = ROOT / f".{link}"
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target.relative_to(ROOT))
    os.replace(scratch, ROOT / link)
    _sync(ROOT)


def name_of(link: str) -> str:
    """The release that a link leads to; empty where there is none."""
    try:
        return Path(os.readlink(ROOT / link)).name
    except OSError:
        return ""


def write(path: Path, value: Any) -> None:
    """A small JSON file, readable for all, in one step that outlives a power cut."""
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fchmod(descriptor, 0o644)
            os.fsync(descriptor)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
    _sync(path.parent)


def say(priority: int, event: str, **values: Any) -> None:
    """A line for the journal, as those of the companion."""
    print(f"<{priority}>{json.dumps({'event': event, **values}, ensure_ascii=False, separators=(',', ':'))}", flush=True)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
