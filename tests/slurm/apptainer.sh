#!/usr/bin/env bash
# Stands in for `apptainer exec --nv --bind MOUNTS --pwd DIRECTORY IMAGE COMMAND …`: no container, but a view of the
# host in which HIDDEN, the directory that holds all files of the trial, is empty besides what MOUNTS names.
set -euo pipefail

if [[ $1 != --inside ]]; then exec unshare --mount "$0" --inside "$@"; fi
shift
[[ "$1 $2 $3 $5" == "exec --nv --bind --pwd" ]] || { echo "not understood: $*" >&2 && exit 2; }
mounts=$4 directory=$6 image=$7
shift 7
[[ -f $image ]] || { echo "there is no image $image" >&2 && exit 2; }

mount --bind "$HIDDEN" /mnt
mount -t tmpfs hidden "$HIDDEN"
for mount in ${mounts//,/ }; do
  source=${mount%%:*} target=${mount#*:}
  [[ $source == "$HIDDEN"/* ]] || continue
  mkdir -p "$target"
  mount --bind "/mnt${source#"$HIDDEN"}" "$target"
done
umount /mnt
cd "$directory"
exec "$@"
