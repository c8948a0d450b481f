"""Executes a Dockerfile in a clean Debian root, without a container engine, and runs the README in it.

    make image-root

What an engine would do with ``docker/cpu.Dockerfile`` is done by debootstrap and chroot: the base image's
Debian with its Python, every RUN and COPY in order and as the user of its place, the health check, and then
the README's recipes in reduced form as the user of the image and, for ``docker run --user``, as another one.
Debian's own Python takes the place of the one that the base image builds from source. Everything happens in a
mount namespace, whose mounts end with it, in a directory that is removed.

pip in the root gets the settings of this machine's pip, as an engine behind a mirror would be told them.

Exit codes: 0 all ran; 1 something in the image failed; 77 this machine lacks a package or a right.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.cli.readme_walk import reduced, write_inputs
from tests.image import dockerfile
from tests.namespaces import CANNOT_RUN, TrialFailed, run_inside, say, why_not

REPOSITORY = Path(__file__).parents[2]
MIRROR = "http://deb.debian.org/debian"
PACKAGES = {"debootstrap": "debootstrap"}
ANYONE = "4711:4711"
"""Stands for ``docker run --user``: a user that the image has never heard of."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHARED_MEMORY = "64m"
"""What Docker gives a container."""


class CannotRun(Exception):
    """This machine lacks what the script needs; the text is the reason with its cure."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the namespace and the directory, run everything in them, and remove them."""
    parser = argparse.ArgumentParser(description="execute a Dockerfile in a clean Debian root")
    parser.add_argument("file", nargs="?", type=Path, default=REPOSITORY / "docker" / "cpu.Dockerfile")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--mirror", default=MIRROR, help="Debian's packages [%(default)s]")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.inside is not None:
            build_args = dict(word.split("=", 1) for word in options.build_arg)
            return inside(options.inside, options.file, build_args, options.mirror)
        # The network is that of the machine, from which packages come.
        if reason := why_not(PACKAGES, network=False):
            raise CannotRun(reason)
    except CannotRun as error:
        print(f"image-root cannot run: {error}", file=sys.stderr)
        return CANNOT_RUN
    except (TrialFailed, dockerfile.NotUnderstoodError) as error:
        print(f"image-root failed: {error}", file=sys.stderr)
        return 1
    folder = tempfile.mkdtemp(prefix="esm2mega-image-")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return run_inside([sys.executable, "-m", __spec__.name, "--inside", folder, *words], network=False)
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", folder], check=True)


def inside(folder: Path, file: Path, build_args: Mapping[str, str], mirror: str) -> int:
    """Do the work, in the namespace."""
    started = time.monotonic()
    image = dockerfile.read(file, build_args)
    root = Root(folder / "root", image)
    root.bootstrap(mirror)
    with root.pip_of_this_machine() as settings:
        for step in image.steps:
            if step.word == "COPY":
                root.copy(step)
            else:
                root.run(step.text, step.user, step.workdir, {**step.environment, **settings})
    runs = sum(step.word == "RUN" for step in image.steps)
    lines = [line for _, line in reduced()]
    for user, chosen in ((image.user, lines), (ANYONE, [*lines[:2], *lines[10:12]])):
        work = root.work_folder(user)
        root.run(" ".join(image.healthcheck), user, work, image.environment)
        for line in ("esm2mega doctor", *chosen):
            root.run(line, user, work, image.environment, shell="/bin/bash")
    print(
        f"image-root: {file.name}: {runs} RUN lines, then {len(lines)} commands of the README as user "
        f"{image.user} and some as {ANYONE}: all ended with 0, {time.monotonic() - started:.0f} s"
    )
    return 0


class Root:
    """A Debian in a directory, and commands in it."""

    def __init__(self, path: Path, image: dockerfile.Image) -> None:
        self.path, self.image = path, image

    def bootstrap(self, mirror: str) -> None:
        """Install Debian with what the base image has, and mount what an engine mounts.

        Raises:
            CannotRun: The base image is not one that can be made here, or Debian cannot be had.
        """
        found = re.fullmatch(r"python:(3\.\d+)-slim-(\w+)", self.image.base)
        if found is None:
            raise CannotRun(f"its base {self.image.base} is not python:VERSION-slim-RELEASE of Debian")
        python, release = f"python{found[1]}", found[2]
        say(f"FROM {self.image.base}: Debian {release} with its own {python}")
        packages = f"ca-certificates,{python},{python}-dev,python3-pip"
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", release, self.path, mirror]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            last = (done.stdout + done.stderr).strip().splitlines()[-1]
            raise CannotRun(f"debootstrap of {release} from {mirror}: {last}")
        # The base image's Python is called so, and is not the distribution's, which pip would leave alone.
        for name, program in (("python", python), ("pip", "pip3")):
            (self.path / "usr/local/bin" / name).symlink_to(f"/usr/bin/{program}")
        (self.path / "usr/lib" / python / "EXTERNALLY-MANAGED").unlink(missing_ok=True)
        # An engine writes this file, with the name of the container.
        hosts = f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {socket.gethostname()}\n"
        (self.path / "etc/hosts").write_text(hosts)
        self._mount("-t", "proc", "proc", self.path / "proc")
        (self.path / "dev/shm").mkdir(exist_ok=True)
        self._mount("-t", "tmpfs", "-o", f"size={SHARED_MEMORY},mode=1777", "tmpfs", self.path / "dev/shm")

    @contextlib.contextmanager
    def pip_of_this_machine(self) -> Iterator[dict[str, str]]:
        """Yield the settings of this machine's pip as variables; what they name is in the root meanwhile."""
        listed = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
        )
        settings, mounted = {}, []
        for name, value in re.findall(r"^\S*?\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE):
            settings[f"PIP_{name.upper().replace('-', '_')}"] = value
            for word in value.replace("\\n", " ").split():
                source = Path(word.removeprefix("file://"))
                # The pages of an index name files that lie beside them.
                source = source.parent if word.startswith("file://") else source
                target = self.path / source.relative_to("/") if source.is_absolute() else source
                if not source.is_absolute() or not source.exists() or target in mounted:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                target.mkdir(exist_ok=True) if source.is_dir() else target.touch()
                self._mount("--bind", "-o", "ro", source, target)
                mounted.append(target)
        try:
            yield settings
        finally:
            for target in mounted:
                subprocess.run(["umount", target], check=True)

    def copy(self, step: dockerfile.Step) -> None:
        """Copy files, and what is in directories, as COPY does."""
        say(f"COPY {step.text}")
        *sources, target = step.text.split()
        into = self._workdir(step.workdir) / target
        for name in sources:
            source = REPOSITORY / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, into, dirs_exist_ok=True, ignore=ignored)
            else:
                into.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, into)

    def work_folder(self, user: str) -> str:
        """Make a directory of a user below the work directory, with the README's inputs, and return it."""
        uid, _, gid = user.partition(":")
        folder = self._workdir(self.image.workdir) / f"of_{uid}"
        folder.mkdir()
        write_inputs(folder)
        for path in (folder, *folder.iterdir()):
            os.chown(path, int(uid), int(gid or uid))
        return f"{self.image.workdir}/{folder.name}"

    def run(
        self, line: str, user: str, workdir: str, environment: Mapping[str, str], shell: str = "/bin/sh"
    ) -> None:
        """Run a line of shell in the root.

        Raises:
            TrialFailed: It did not end with 0; the text has the end of its output.
        """
        say(f"[{user}] {line}")
        self._workdir(workdir)
        started = time.monotonic()
        variables = [
            f"{name}={value}" for name, value in {"PATH": PATH, "HOME": "/root", **environment}.items()
        ]
        command = ["chroot", f"--userspec={user}", "--groups=", self.path, "/usr/bin/env", "-i", *variables]
        command += [shell, "-c", f"cd {workdir} || exit; {line}"]
        done = subprocess.run(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output = done.stdout.decode(errors="replace").strip()
        if done.returncode:
            raise TrialFailed(f"[{user}] {line}: exit code {done.returncode}\n{output[-4000:]}")
        if line.startswith("esm2mega doctor"):
            print(output)
        say(f"    0 after {time.monotonic() - started:.0f} s")

    def _workdir(self, path: str) -> Path:
        folder = self.path / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _mount(self, *words: str | Path) -> None:
        subprocess.run(["mount", *map(str, words)], check=True)


if __name__ == "__main__":
    sys.exit(main())
