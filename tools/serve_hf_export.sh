#!/usr/bin/env bash
# Serves an exported model on this machine, by vLLM's own OpenAI-compatible server: on 127.0.0.1
# alone, behind a token, until a signal or the end of COMMAND.
#
#   tools/serve_hf_export.sh EXPORT_FOLDER [options] [-- COMMAND ...]     (--help shows the options)
#
# The environment is the one that `scripts/setup.sh vllm` makes (GDPO_VENV followed by -vllm; GDPO_VENV
# itself where that has vLLM, as on a machine with GPUs). COMMAND finds the server in the variables
# GDPO_SERVED_URL, GDPO_SERVED_MODEL, GDPO_SERVED_EXPORT and GDPO_SERVE_TOKEN.
#
# Exit codes: COMMAND's; without one 0 after a signal; 2 something has to be put right first;
# 1 the server did not start, or did not last.
set -euo pipefail

repo="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="${GDPO_VENV:-$repo/.venv}"

has_vllm() { [[ -x "$1/bin/python" && -x "$1/bin/vllm" ]]; }

if has_vllm "$venv-vllm"; then
  venv="$venv-vllm"
elif ! has_vllm "$venv"; then
  printf 'serve_hf_export: no vLLM in %s-vllm or %s; scripts/setup.sh vllm makes an environment %s\n' \
    "$venv" "$venv" "with it (another place: GDPO_VENV)" >&2
  exit 2
fi
# The same process from here on: who signals this one reaches the one that ends the server.
exec "$venv/bin/python" "$repo/tools/outside/serve.py" "$@"
