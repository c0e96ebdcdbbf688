# Words that bash completes after launch.py and the tools. Written by tools/dev/completion.py; use it with
#   source tools/completion.bash
_cvae_names() { local file; for file in "$1"/*.yaml; do basename "$file" .yaml; done; }
_cvae_runs() { local file; for file in runs/*/config.yaml runs/*/*/config.yaml; do
  [ -e "$file" ] && dirname "$file"; done; }
_cvae_keys() { sed -n 's/^| `\([a-z0-9_.]*\)` .*/\1=/p' docs/configuration.md; }
_cvae() {
  local here="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" script="" word words=""
  for word in "${COMP_WORDS[@]:0:COMP_CWORD}"; do
    case "$word" in
      launch.py | */launch.py) script=launch.py ;;
      tools/*.py | */tools/*.py) script="tools/${word##*tools/}" ;;
    esac
  done
  case "$script $before" in
    "launch.py --cluster") words="$(_cvae_names configs/cluster)" ;;
    "launch.py --config") words="$(_cvae_names configs)" ;;
    "launch.py --overlay") words="$(_cvae_names configs/overlays)" ;;
    "launch.py --stages") words="shard train tune refine steer classifier eval" ;;
    "launch.py --run-dir") words="$(_cvae_runs)" ;;
    "tools/check_shards.py --repair") words="$(_cvae_runs)" ;;
    "tools/edit.py --device") words="cpu cuda" ;;
    "tools/explore.py --device") words="cpu cuda" ;;
    "tools/export.py --weights") words="ema raw" ;;
    "tools/export.py --stage") words="train tune refine steer" ;;
    "tools/export.py --formats") words="onnx pt2" ;;
    "tools/inspect_data.py --kind") words=" celeba celeba_hq parquet webdataset images+csv" ;;
    "tools/sample.py --device") words="cpu cuda" ;;
    *) case "$script" in
      launch.py) words="-h --help --version $(_cvae_keys) --cluster --config --overlay --sweep --stages --run-dir --dry-run --wait --no-preflight" ;;
      tools/cancel.py) words="-h --help --version $(_cvae_runs)" ;;
      tools/check_shards.py) words="-h --help --version --repair" ;;
      tools/compare.py) words="-h --help --version $(_cvae_runs) --tag --uri --experiment --out" ;;
      tools/edit.py) words="-h --help --version $(_cvae_runs) --attributes --strength --eyes --crop --device --out" ;;
      tools/explore.py) words="-h --help --version $(_cvae_runs) --port --device" ;;
      tools/export.py) words="-h --help --version $(_cvae_runs) --checkpoint --weights --stage --formats --register" ;;
      tools/fetch_weights.py) words="-h --help --version --url" ;;
      tools/inspect_data.py) words="-h --help --version --kind --check --allow-pipe --out" ;;
      tools/logs.py) words="-h --help --version $(_cvae_runs) shard train tune refine steer classifier eval finish --rank --follow -f" ;;
      tools/sample.py) words="-h --help --version $(_cvae_runs) --requests --n --seed --temperature --guidance --margin --tries --background --device --out" ;;
      tools/status.py) words="-h --help --version $(_cvae_runs) --follow -f --runs-dir" ;;
      tools/sync_mlflow.py) words="-h --help --version $(_cvae_runs) --uri --experiment" ;;
    esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$here"))
  case "${COMPREPLY[0]}" in *=) compopt -o nospace 2>/dev/null ;; esac
}
complete -o default -F _cvae python python3 .venv/bin/python launch.py
