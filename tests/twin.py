"""The twin of a board: a Debian 13 root that boots its own systemd, journald and sshd under systemd-nspawn, reached by ssh.

`python tests/twin.py` runs one until Ctrl-C, and says how to reach it (`make twin`). Needs root, and the first time a Debian mirror.
A twin has no way to the internet, a sound server of two null sinks (room, whose monitor is the microphone, and speaker) behind ALSA's
default device, and a camera that is a folder of pictures. Each is an overlay on one root, so a fresh one takes no time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "build" / "twin"
SUITE = "trixie"
PACKAGES = (
    "systemd systemd-sysv dbus openssh-server sudo openssl iproute2 procps rsync python3 python3-minimal libpython3-stdlib "
    "python3-pyaudio libportaudio2 libasound2-plugins pulseaudio pulseaudio-utils"
).split()
BRIDGE, NETWORK = "twin0", "10.177.0"
BOOT_S = 120.0  # it takes 5; this machine may be busy
T = TypeVar("T")

SOUND = """\
[Unit]
Description=the twin's sound card: two null sinks
[Service]
User=twin-sound
RuntimeDirectory=twin-sound
RuntimeDirectoryMode=0755
Environment=HOME=/run/twin-sound XDG_RUNTIME_DIR=/run/twin-sound
ExecStart=/usr/bin/pulseaudio -n --daemonize=no --exit-idle-time=-1 --disable-shm=yes \\
    "--load=module-native-protocol-unix socket=/run/twin-sound/socket auth-anonymous=1" \\
    "--load=module-null-sink sink_name=room rate=16000 channels=1" "--load=module-null-sink sink_name=speaker rate=16000 channels=1"
ExecStartPost=/bin/sh -c 'for i in $(seq 100); do pactl -s unix:/run/twin-sound/socket info >/dev/null 2>&1 && break; sleep 0.1; done; \\
    pactl -s unix:/run/twin-sound/socket set-default-source room.monitor; pactl -s unix:/run/twin-sound/socket set-default-sink speaker'
Restart=always
[Install]
WantedBy=sound.target multi-user.target
"""
FILES = {
    "etc/systemd/system/twin-sound.service": SOUND,
    # A board's own settings; PULSE_LATENCY_MSEC: without it ALSA's plugin moves two seconds at a time.
    "etc/systemd/system/copresence.service.d/twin.conf": "[Unit]\nAfter=twin-sound.service\n"
    "[Service]\nEnvironment=PULSE_LATENCY_MSEC=20\nEnvironmentFile=-/etc/copresence/twin.env\n",
    "etc/copresence/copresence.toml": '[camera]\nsource = "/var/lib/twin-camera.mkv"\n'
    "[audio]\nplayout_offset_ms = 150 # the machine under it has other things to do\n",
    "etc/asound.conf": "".join(f'{kind}.!default {{ type pulse server "unix:/run/twin-sound/socket" }}\n' for kind in ("pcm", "ctl")),
    "etc/sudoers.d/field": "field ALL=(ALL) NOPASSWD: ALL\n",
    "etc/ssh/sshd_config.d/twin.conf": "PasswordAuthentication no\nPermitRootLogin no\nUseDNS no\n",
    "etc/machine-id": "",
}


class NoTwin(Exception):
    """This machine cannot make or boot one; the text says why."""


class Twin:
    """One board: made, started, reached, broken, killed. `number` makes its address."""

    def __init__(self, name: str, number: int = 10) -> None:
        self.name, self.address = name, f"{NETWORK}.{number}"
        self.folder = FOLDER / "machines" / name
        self.root = self.folder / "root"
        self._process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        """A fresh board, nothing of ours on it."""
        self.delete()
        base = base_root()
        for part in ("upper", "work", "root"):
            (self.folder / part).mkdir(parents=True)
        layers = f"lowerdir={base},upperdir={self.folder / 'upper'},workdir={self.folder / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)], check=True)
        self.write("etc/systemd/network/10-host0.network", f"[Match]\nName=host0\n[Network]\nAddress={self.address}/24\nIPv6AcceptRA=no\n")
        self.write("etc/hostname", f"{self.name}\n")
        self.write("etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")  # sudo looks it up

    def delete(self) -> None:
        """Stop it and forget it."""
        self.kill()
        while subprocess.run(["umount", "--lazy", str(self.root)], capture_output=True).returncode == 0:
            pass
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Power on; returns when ssh answers. Raises NoTwin."""
        _network()
        command = [
            "systemd-nspawn",
            "--quiet",
            "--boot",
            "--register=no",
            "--keep-unit",
            f"--machine={self.name}",
            f"--directory={self.root}",
        ]
        command += [f"--network-bridge={BRIDGE}", "--link-journal=no", "--resolv-conf=off", "--timezone=off", "--console=pipe"]
        command += ["--setenv=SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"]
        environment = {**os.environ, "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE": "1"}
        with (self.folder / "console.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        process = self._process

        def answers() -> bool:
            if process.poll() is not None:
                last = (self.folder / "console.log").read_text(errors="replace").splitlines()[-3:]
                raise NoTwin(f"systemd-nspawn ended: {' / '.join(last)}")
            return self.ssh("true", check=False).returncode == 0

        until(answers, f"{self.name} to answer", BOOT_S)

    def kill(self) -> None:
        """Pull the plug: every process of the board is gone at once."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            for pid in Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split():
                os.kill(int(pid), signal.SIGKILL)  # PID 1 of the container: the kernel ends all others with it
        try:
            self._process.wait(30)  # systemd-nspawn tidies up after it
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        # The kernel takes the board's end of the cable away in its own time.
        subprocess.run(["ip", "link", "delete", f"vb-{self.name}"], capture_output=True)
        until(lambda: not Path(f"/sys/class/net/vb-{self.name}").exists(), "its cable to be gone", 30.0)

    def reboot(self) -> None:
        """Power off and on."""
        self.kill()
        self.start()

    def ssh(self, command: str, check: bool = True, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a shell command as the field engineer; raises CalledProcessError with what it said."""
        done = subprocess.run(
            [str(ssh_wrapper()), self.name, command], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{self.name}: {command!r} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def sudo(self, command: str, check: bool = True, timeout: float = 120.0) -> str:
        """Output of a shell command run as root there."""
        return self.ssh(f"sudo -n sh -c {_quoted(command)}", check, timeout).stdout

    def write(self, path: str, text: str) -> None:
        """Put a file into its root, from outside."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def status(self) -> dict[str, Any]:
        """What the running companion says of itself; empty while it says nothing, or says it no more."""
        said = self.ssh("sudo -n cat /run/copresence/status.json", check=False).stdout
        try:
            return dict(json.loads(said))
        except ValueError:
            return {}

    def link(self, name: str) -> str:
        """Name of the release that /opt/copresence/<name> leads to; '' where there is none."""
        link = self.root / "opt" / "copresence" / name
        return Path(os.readlink(link)).name if link.is_symlink() else ""


def until(condition: Callable[[], T], what: str, limit_s: float = 120.0, every_s: float = 0.5) -> T:
    """The first true value of `condition`; raises AssertionError after `limit_s`."""
    end_s = time.monotonic() + limit_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < end_s, f"waited {limit_s:.0f} s for {what}"
        time.sleep(every_s)


def ssh_wrapper() -> Path:
    """A program `ssh` that knows the twins by name; its folder in front of PATH lets make, rsync and Ansible reach them."""
    program = FOLDER / "bin" / "ssh"
    if not program.exists():
        key = FOLDER / "key"
        if not key.exists():
            FOLDER.mkdir(parents=True, exist_ok=True)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        program.parent.mkdir(parents=True, exist_ok=True)
        numbers = {"twin": 10, "twin-1": 11, "twin-2": 12, "twin-3": 13}
        hosts = "".join(f"Host {name}\n  HostName {NETWORK}.{number}\n" for name, number in numbers.items())
        options = f"Host *\n  User field\n  IdentityFile {key}\n  UserKnownHostsFile {FOLDER / 'known_hosts'}\n  ConnectTimeout 5\n"
        (FOLDER / "ssh_config").write_text(hosts + options + "  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n", encoding="utf-8")
        program.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {FOLDER / "ssh_config"} "$@"\n', encoding="utf-8")
        program.chmod(0o755)
    return program


def base_root() -> Path:
    """The root that all twins share, made once; raises NoTwin."""
    for program in ("debootstrap", "systemd-nspawn", "rsync", "ip"):
        if shutil.which(program) is None:
            raise NoTwin(f"{program} is not installed; apt-get install debootstrap systemd-container rsync iproute2")
    if os.geteuid() != 0:
        raise NoTwin("only root can make one")
    ssh_wrapper()
    root, ready = FOLDER / "root", FOLDER / "root.ready"
    wanted = hashlib.sha256(repr((SUITE, PACKAGES, FILES)).encode()).hexdigest()
    if ready.exists() and ready.read_text() == wanted:
        return root
    packages = FOLDER / "packages"
    if not (root / "usr" / "bin" / "python3").exists() or (packages.exists() and packages.read_text() != repr(PACKAGES)):
        shutil.rmtree(root, ignore_errors=True)
        fast = ["eatmydata"] if shutil.which("eatmydata") else []  # a root that a power cut spoils is made again
        command = [
            *fast,
            "debootstrap",
            "--variant=minbase",
            f"--include={','.join(PACKAGES)}",
            SUITE,
            str(root),
            "http://deb.debian.org/debian",
        ]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise NoTwin(f"debootstrap failed: {' / '.join((done.stdout + done.stderr).splitlines()[-3:])}")
    packages.write_text(repr(PACKAGES))
    _camera(root / "var" / "lib" / "twin-camera.mkv")
    for path, text in FILES.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    (root / "etc/sudoers.d/field").chmod(0o440)
    script = (
        "id field >/dev/null 2>&1 || useradd --create-home --shell /bin/sh --groups adm,systemd-journal field; "
        "id twin-sound >/dev/null 2>&1 || useradd --system --groups audio twin-sound; "
        "ssh-keygen -A; systemctl enable -q systemd-networkd ssh twin-sound; "
        "systemctl mask -q systemd-resolved systemd-timesyncd getty.target "
        "console-getty.service apt-daily.timer apt-daily-upgrade.timer; install -d -m 700 -o field -g field /home/field/.ssh"
    )
    done = subprocess.run(["chroot", str(root), "sh", "-c", script], capture_output=True, text=True)
    if done.returncode != 0:
        raise NoTwin(f"the twin's root cannot be set up: {done.stderr.strip()}")
    authorized = root / "home/field/.ssh/authorized_keys"
    shutil.copy(FOLDER / "key.pub", authorized)
    owner = authorized.parent.stat()
    os.chown(authorized, owner.st_uid, owner.st_gid)
    ready.write_text(wanted)
    return root


def _camera(path: Path) -> None:
    """Twenty minutes of a slowly changing grey, 5 frames a second."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for k in range(20 * 60 * 5):
            frame = av.VideoFrame.from_ndarray(np.full((120, 160, 3), 60 + k % 120, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _network() -> None:
    """The bridge that all twins are on, without a way out."""
    if not Path(f"/sys/class/net/{BRIDGE}").exists():
        for command in (f"link add {BRIDGE} type bridge", f"addr add {NETWORK}.1/24 dev {BRIDGE}", f"link set {BRIDGE} up"):
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode != 0:
                raise NoTwin(f"no network bridge here: {done.stderr.strip()}")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


@contextlib.contextmanager
def running(name: str = "twin", number: int = 10) -> Iterator[Twin]:
    """A fresh twin that runs."""
    twin = Twin(name, number)
    try:
        twin.create()
        twin.start()
        yield twin
    finally:
        twin.delete()


def main(arguments: list[str]) -> int:
    """Run a twin until Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with running() as twin:
            print(f"{twin.name} runs at {twin.address}. In another terminal:")
            print(f"  export PATH={ssh_wrapper().parent}:$PATH")
            print(f"  make flash HOST={twin.name}")
            signal.pause()
    except NoTwin as error:
        print(f"no twin: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
