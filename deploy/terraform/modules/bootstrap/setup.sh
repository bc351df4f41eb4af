#!/bin/bash
# Makes a parent instance of Parley out of Amazon Linux 2023: the data volume, the coordinator, the enclave image, the services.
# cloud-init runs it at the first boot. It may be run again at any time: what is there already stays, tables and keys above all.
set -euo pipefail

# Tests set ROOT and a PATH of their own.
ROOT=${ROOT:-}
DATA=$ROOT/var/lib/parley
PROGRAM=$ROOT/opt/parley
# shellcheck source=/dev/null
source "$ROOT/etc/parley/setup.env"

say() { printf 'parley-setup: %s\n' "$*" >&2; }

# Downloads an object, and puts it in place only if its SHA-384 is the expected one.
fetch() { # KEY SHA384 TARGET
  local part=$3.part
  aws s3 cp --only-show-errors --region "$REGION" "s3://$BUCKET/$1" "$part"
  if ! printf '%s  %s\n' "$2" "$part" | sha384sum --check --status; then
    say "$1: SHA-384 is $(sha384sum "$part" | cut -d ' ' -f 1), not $2"
    rm -f "$part"
    exit 1
  fi
  mv "$part" "$3"
}

mount_data() {
  local tries=0
  until [ -e "$DEVICE" ]; do
    tries=$((tries + 1))
    if [ "$tries" -gt 150 ]; then
      say "$DEVICE: the data volume was not attached within 5 minutes"
      exit 1
    fi
    sleep 2
  done
  # Only a volume without any signature is new. blkid says 2 for that, and something else for a device that it cannot read.
  local found=0
  blkid --probe "$DEVICE" >/dev/null || found=$?
  case $found in
    0) ;;
    2) mkfs.xfs -q -L parley "$DEVICE" ;;
    *) say "$DEVICE: cannot be read (blkid: $found)"; exit 1 ;;
  esac
  mkdir -p "$DATA"
  if ! grep -q '^LABEL=parley ' "$ROOT/etc/fstab"; then
    echo 'LABEL=parley /var/lib/parley xfs defaults,nodev,nosuid,noexec,noatime 0 2' >>"$ROOT/etc/fstab"
  fi
  systemctl daemon-reload
  mountpoint -q "$DATA" || mount "$DATA"
  chown parley:parley "$DATA"
  chmod 0700 "$DATA"
}

install_coordinator() {
  mkdir -p "$PROGRAM"
  fetch "$BUNDLE_KEY" "$BUNDLE_SHA384" "$PROGRAM/coordinator.tar"
  rm -rf "$PROGRAM/wheels"
  mkdir "$PROGRAM/wheels"
  tar --extract --no-same-owner --file "$PROGRAM/coordinator.tar" --directory "$PROGRAM/wheels"
  python3.11 -m venv --clear "$PROGRAM/venv"
  # Nothing comes from the network: the bundle, whose digest was checked, holds every wheel that a coordinator needs. Without
  # --no-deps pip would also ask for what only the client needs.
  "$PROGRAM/venv/bin/python" -m pip install --quiet --no-index --no-deps "$PROGRAM"/wheels/*.whl
  mkdir -p "$PROGRAM/bin"
  ln -sfn ../venv/bin/parley-coordinator "$PROGRAM/bin/parley-coordinator"
}

configure() {
  # Without a configuration nothing was ever served here, so half a first run is thrown away; with one, all stays as it is.
  if [ -e "$DATA/coordinator.toml" ]; then
    return
  fi
  rm -rf "$DATA/first"
  runuser -u parley -- "$PROGRAM/bin/parley-coordinator" init --dir "$DATA/first" --listen 0.0.0.0:7443 --name "$HOST_NAME"
  mv -f "$DATA/first/tls.key" "$DATA/first/tls.crt" "$DATA/"
  install -o parley -g parley -m 0600 "$ROOT/etc/parley/coordinator.toml" "$DATA/first/coordinator.toml"
  mv -f "$DATA/first/coordinator.toml" "$DATA/"
  rm -rf "$DATA/first"
}

systemd-sysusers
mount_data
install_coordinator
fetch "$IMAGE_KEY" "$IMAGE_SHA384" "$PROGRAM/parley.eif"
configure
install -D -m 0644 "$ROOT/etc/parley/allocator.yaml" "$ROOT/etc/nitro_enclaves/allocator.yaml"
systemctl enable --now nitro-enclaves-allocator.service
if grep -q '^database = "postgresql:' "$DATA/coordinator.toml" && ! [ -s "$DATA/.pgpass" ]; then
  # A person brings the password, and with it the key and the authority: deploy/README.md says how.
  systemctl enable parley-coordinator.service parley-backup.timer
  say "done, but for $DATA/.pgpass, without which there is no database"
  exit 0
fi
systemctl enable --now parley-coordinator.service
systemctl enable --now parley-backup.timer
say "done: the coordinator listens at $HOST_NAME:7443"
