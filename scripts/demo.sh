#!/usr/bin/env bash
# Installs this checkout in .venv and runs the demo; arguments go to `python -m examples.json_extraction`.
source "$(dirname "$0")/environment.sh"
prepare demo
exec .venv/bin/python -m examples.json_extraction "$@"
