"""``python -m weightshare``."""

from weightshare.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
