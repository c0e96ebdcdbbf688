# Words that bash completes after launch.py and the tools. Written by tools/dev/completion.py; use it with
#   source tools/completion.bash
_cvae_names() { local file; for file in "$1"/*.yaml; do basename "$file" .yaml; done; }
_cvae_runs() { local file; for file in runs/*/config.yaml runs/*/*/config.yaml; do
  [ -e "$file" ] && dirname "$file"; done; }
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
    "launch.py --stages") words="shard train tune refine classifier eval" ;;
    "launch.py --run-dir") words="$(_cvae_runs)" ;;
    "tools/check_shards.py --repair") words="$(_cvae_runs)" ;;
    "tools/edit.py --device") words="cpu cuda" ;;
    "tools/export.py --weights") words="ema raw" ;;
    "tools/export.py --stage") words="train tune refine" ;;
    "tools/sample.py --device") words="cpu cuda" ;;
    *) case "$script" in
      launch.py) words="-h --help --version name= seed= runs_dir= toy.n= toy.seed= shard.source= shard.crop= shard.size= shard.samples_per_shard= shard.seed= shard.allow_subset= shard.skip_damaged= shard.allow_upsampling= data.shards= data.attributes= data.flip= data.rotation_degrees= data.shards_at_once= data.verify= data.damaged= data.stage_to= model.z_dim= model.log_sigma_min= model.net.channels= model.net.norm= model.net.activation= model.residual.channels= model.residual.encoder_blocks= model.residual.decoder_blocks= model.residual.grid= model.encoder.name= model.decoder.name= model.conditioner.name= model.conditioner.width= model.prior.name= model.prior.net= model.prior.hidden= model.prior.flow.layers= model.prior.flow.hidden= model.prior.flow.depth= model.prior.flow.bound= model.prior.flow.conditional= model.prior.flow.alternate= model.prior.flow_matching.net= model.prior.flow_matching.width= model.prior.flow_matching.blocks= model.prior.flow_matching.condition= model.prior.flow_matching.side= model.prior.flow_matching.channels= model.prior.flow_matching.steps= model.prior.flow_matching.draws= model.variance.name= model.variance.floor= model.losses.edges.weight= model.losses.perceptual.weight= model.losses.perceptual.network= model.losses.perceptual.size= optim.name= optim.schedule= optim.lr= optim.beta1= optim.beta2= optim.weight_decay= optim.warmup_images= optim.final_lr_fraction= optim.clip_norm= train.images= train.batch_size= train.micro_batch= train.kl_warmup_images= train.ema_decay= train.precision= train.step= train.channels_last= train.deterministic= train.log_interval= train.val_interval= train.max_lost_steps= train.keep_checkpoints= train.keep_every= train.max_bad_steps= train.profile= train.threads= train.timeout_s= train.stall_s= train.init_from= tune.images= tune.batch_size= tune.ema_decay= tune.optim.name= tune.optim.schedule= tune.optim.lr= tune.optim.beta1= tune.optim.beta2= tune.optim.weight_decay= tune.optim.warmup_images= tune.optim.final_lr_fraction= tune.optim.clip_norm= tune.losses.edges.weight= tune.losses.perceptual.weight= tune.losses.perceptual.network= tune.losses.perceptual.size= refine.images= refine.batch_size= refine.attribute_dropout= refine.ema_decay= refine.optim.name= refine.optim.schedule= refine.optim.lr= refine.optim.beta1= refine.optim.beta2= refine.optim.weight_decay= refine.optim.warmup_images= refine.optim.final_lr_fraction= refine.optim.clip_norm= refine.prior.name= refine.prior.net= refine.prior.hidden= refine.prior.flow.layers= refine.prior.flow.hidden= refine.prior.flow.depth= refine.prior.flow.bound= refine.prior.flow.conditional= refine.prior.flow.alternate= refine.prior.flow_matching.net= refine.prior.flow_matching.width= refine.prior.flow_matching.blocks= refine.prior.flow_matching.condition= refine.prior.flow_matching.side= refine.prior.flow_matching.channels= refine.prior.flow_matching.steps= refine.prior.flow_matching.draws= classifier.epochs= classifier.batch_size= classifier.lr= classifier.weight_decay= classifier.precision= classifier.seed= eval.split= eval.n= eval.block= eval.checkpoint= eval.weights= eval.stage= eval.guidance= eval.edit_strength= eval.flip_images= eval.metrics= eval.iw_images= eval.iw_samples= eval.rare_samples= eval.neighbour_images= eval.kid_subsets= eval.kid_subset_size= eval.judge= eval.inception_weights= eval.network= eval.network_name= eval.network_sha256= eval.network_size= eval.projection= eval.seed= tracking.enabled= tracking.name= tracking.uri= tracking.experiment= cluster.executor= cluster.nodes= cluster.tasks_per_node= cluster.gpus_per_node= cluster.cpus_per_task= cluster.mem_gb= cluster.timeout_min= cluster.partition= cluster.account= cluster.qos= cluster.constraint= cluster.signal_delay_s= cluster.jobs= cluster.max_timeouts= cluster.max_crashes= cluster.max_restarts= cluster.python= cluster.setup= --cluster --config --overlay --sweep --stages --run-dir --dry-run --wait --no-preflight" ;;
      tools/cancel.py) words="-h --help --version $(_cvae_runs)" ;;
      tools/check_shards.py) words="-h --help --version --repair" ;;
      tools/compare.py) words="-h --help --version $(_cvae_runs) --tag --uri --experiment --out" ;;
      tools/edit.py) words="-h --help --version $(_cvae_runs) --attributes --strength --crop --device --out" ;;
      tools/export.py) words="-h --help --version $(_cvae_runs) --checkpoint --weights --stage" ;;
      tools/fetch_weights.py) words="-h --help --version --url" ;;
      tools/logs.py) words="-h --help --version $(_cvae_runs) shard train tune refine classifier eval finish --rank --follow -f" ;;
      tools/make_toy_celeba.py) words="-h --help --version --n --seed --processes --out" ;;
      tools/sample.py) words="-h --help --version $(_cvae_runs) --n --seed --temperature --guidance --device --out" ;;
      tools/status.py) words="-h --help --version $(_cvae_runs) --follow -f --runs-dir" ;;
      tools/sync_mlflow.py) words="-h --help --version $(_cvae_runs)" ;;
    esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$here"))
  case "${COMPREPLY[0]}" in *=) compopt -o nospace 2>/dev/null ;; esac
}
complete -o default -F _cvae python python3 .venv/bin/python launch.py
