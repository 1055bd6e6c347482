"""The command that comes with the wheel."""

import subprocess
import sys

import foveal


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "foveal", *arguments], capture_output=True, text=True, check=False)


def test_it_lists_the_mechanisms():
    done = run("list")
    assert done.returncode == 0, done.stderr
    assert all(m.name in done.stdout for m in foveal.mechanisms())


def test_it_says_its_version_and_what_it_does_not_know():
    assert foveal.__version__ in run("--version").stdout
    done = run("nonsense")
    assert done.returncode == 2 and "nonsense" in done.stderr
