"""``python -m fakequant``."""

from fakequant.cli.main import main

raise SystemExit(main())
