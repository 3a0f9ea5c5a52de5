#!/usr/bin/env bash
# Builds the documentation in site/; a broken link or an unknown name in the API reference is an error.
#   bash scripts/docs.sh           in .venv, made or completed first
#   bash scripts/docs.sh serve     the same, shown at http://127.0.0.1:8000 while you write
source "$(dirname "$0")/environment.sh"
.venv/bin/python -c "import material, mkdocstrings_handlers.python" 2>/dev/null || prepare docs
export NO_MKDOCS_2_WARNING=1
if [ "${1:-build}" = serve ]; then exec .venv/bin/mkdocs serve; fi
exec .venv/bin/mkdocs build --strict --site-dir site
