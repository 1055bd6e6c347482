#!/usr/bin/env python3
"""flash-attn's own tests, run on Foveal's `flash_attn_func` and `flash_attn_varlen_func`.

    PYTHON scripts/python/flash_attn_tests.py [--every 10] [pytest's arguments]

Takes flash-attn's source package from PyPI (by its hash), and of it `tests/test_flash_attn.py` as it is but for the device, which
becomes the CPU, and a module `flash_attn` of which the functions are Foveal's (packed queries, keys and values are taken apart first).
Out of 508772 combinations, those are kept that both sides have: no dropout (its pattern is one of the GPU), no slopes (drawn anew
for each sequence there), no paged or appended caches, which Foveal has as classes of its own; and lengths to 256. Of these, every
tenth runs, or as --every says.

PYTHON has torch, einops, pytest and foveal.
"""

import argparse
import hashlib
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import urllib.request

PACKAGE = (
    "https://files.pythonhosted.org/packages/6c/b1/b77625e3d11260d2bd6a4fc249a4be9a3da97ff848e2222e810c4f0e0211/"
    "flash_attn-2.8.3.post2.tar.gz"
)
SHA256 = "d0f9f0b08a986cdeadbffcf5ec8b3a8f514366c68ad1853d3ab061bc83cc340b"

MODULE = '''
from foveal import flash_attn_func, flash_attn_varlen_func as _varlen


def flash_attn_varlen_func(*arguments, block_table=None, **options):
    assert block_table is None
    return _varlen(*arguments, **options)


def flash_attn_kvpacked_func(q, kv, *arguments, **options):
    return flash_attn_func(q, *kv.unbind(2), *arguments, **options)


def flash_attn_qkvpacked_func(qkv, *arguments, **options):
    return flash_attn_func(*qkv.unbind(2), *arguments, **options)


def flash_attn_varlen_kvpacked_func(q, kv, *arguments, **options):
    return flash_attn_varlen_func(q, *kv.unbind(1), *arguments, **options)


def flash_attn_varlen_qkvpacked_func(qkv, cuts, longest, *arguments, **options):
    return flash_attn_varlen_func(*qkv.unbind(1), cuts, cuts, longest, longest, *arguments, **options)


def flash_attn_with_kvcache(*arguments, **options):
    raise NotImplementedError
'''

CHOICE = '''
import os

# Of caches.
OWN = {"test_flash_attn_kvcache", "test_flash_attn_splitkv"}


def both_have(item):
    if not hasattr(item, "callspec"):
        return True
    chosen = item.callspec.params
    longest = max(chosen.get(name, 0) for name in ("seqlen", "seqlen_q", "seqlen_k"))
    return (
        item.originalname not in OWN
        and chosen.get("dropout_p", 0.0) == 0.0
        and not chosen.get("alibi", False)
        and chosen.get("paged_kv_block_size") is None
        and longest <= 256
    )


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if both_have(item)]
    every = int(os.environ["FOVEAL_EVERY"])
    print(f"{len(kept)} of {len(items)} combinations are of both sides; every {every}th runs")
    items[:] = kept[::every]
'''


def source():
    """The source package, downloaded once."""
    cache = pathlib.Path(os.environ.get("FOVEAL_CACHE", pathlib.Path.home() / ".cache/foveal"), SHA256)
    file = cache / "flash_attn.tar.gz"
    if not file.exists():
        data = urllib.request.urlopen(PACKAGE, timeout=180).read()
        found = hashlib.sha256(data).hexdigest()
        if found != SHA256:
            sys.exit(f"{PACKAGE} has another hash: {found}, expected {SHA256}")
        cache.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return tarfile.open(fileobj=io.BytesIO(file.read_bytes()))


def text_of(archive, path):
    name = next(name for name in archive.getnames() if name.split("/", 1)[-1] == path)
    return archive.extractfile(name).read().decode()


def lay_out(folder):
    """The tests, and what they import."""
    archive = source()
    test = text_of(archive, "tests/test_flash_attn.py")
    test = test.replace('torch.cuda.get_device_capability("cuda")', "(8, 0)").replace('"cuda"', '"cpu"')
    test = test.replace('torch.cuda.get_device_properties("cuda").total_memory', "2**40")
    (folder / "test_flash_attn.py").write_text(test)
    (folder / "conftest.py").write_text(CHOICE)
    package = folder / "flash_attn"
    (package / "layers").mkdir(parents=True)
    (package / "__init__.py").write_text(MODULE)
    (package / "bert_padding.py").write_text(text_of(archive, "flash_attn/bert_padding.py"))
    # Of caches and of dropout's pattern, which are left out.
    (package / "flash_attn_interface.py").write_text("_get_block_size_n = None\n")
    (package / "layers/__init__.py").write_text("")
    (package / "layers/rotary.py").write_text("apply_rotary_emb = None\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=10)
    arguments, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place:
        lay_out(pathlib.Path(place))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(rest or ["test_flash_attn.py"])]
        environment = os.environ | {"FOVEAL_EVERY": str(arguments.every), "PYTHONPATH": place}
        sys.exit(subprocess.run(command, cwd=place, env=environment).returncode)


if __name__ == "__main__":
    main()
