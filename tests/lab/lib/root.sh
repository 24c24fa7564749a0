# shellcheck shell=bash
# A host's own root file system: $VR_LAB_DIR/host/HOST outside is / inside.
# The machine's /usr is shared read-only; /etc, /var, /root, /tmp and /run are the host's own, so
# nothing it does can reach the machine's libvirt, ssh or home directories.

# What programs want from /etc, and nothing that is secret or that libvirt would act upon.
readonly ETC_COPIED=(passwd group nsswitch.conf ld.so.cache ld.so.conf ld.so.conf.d alternatives login.defs
  localtime protocols services mke2fs.conf magic profile bash.bashrc terminfo debian_version os-release
  swtpm_setup.conf swtpm-localca.conf swtpm-localca.options)

make_tree() { # make_tree HOST: runs outside, before the host exists
  local host=$1 root=$VR_LAB_DIR/host/$1 entry
  mkdir -p "$root"/{dev,proc,sys,run,usr,etc/{ssh,libvirt,virt-replica},home,mnt,srv,old,lab/{shared,guest,tools,bin,small}}
  mkdir -p "$root"/var/{tmp,cache/libvirt,log/libvirt/console,lib/{libvirt/images,virt-replica,misc}}
  mkdir -m 700 "$root/root"
  mkdir -m 1777 "$root/tmp"
  chmod 1777 "$root/var/tmp"
  # Where swtpm's certificates are made, by the user that libvirt runs it as.
  install -d -m 750 -o tss "$root/var/lib/swtpm-localca"
  ln -s /run "$root/var/run"
  for entry in bin sbin lib lib32 lib64 libx32; do
    if [[ -L /$entry ]]; then cp -d "/$entry" "$root/$entry"; elif [[ -d /$entry ]]; then mkdir "$root/$entry"; fi
  done
  for entry in "${ETC_COPIED[@]}"; do
    [[ ! -e /etc/$entry ]] || cp -a "/etc/$entry" "$root/etc/$entry"
  done
  write_etc "$host" "$root"
}

write_etc() {
  local host=$1 root=$2
  echo "lab-$host" >"$root/etc/hostname"
  printf '127.0.0.1 localhost\n192.0.2.1 lab-a a\n192.0.2.2 lab-b b\n' >"$root/etc/hosts"
  tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
  # Nobody has a password here; "*" rather than "!", which sshd takes for a locked account.
  cut -d: -f1 "$root/etc/passwd" | sed 's/$/:*:19000:0:99999:7:::/' >"$root/etc/shadow"
  chmod 600 "$root/etc/shadow"
  write_libvirt "$root/etc/libvirt"
  cat >"$root/etc/ssh/sshd_config" <<CONF
HostKey /etc/ssh/ssh_host_ed25519_key
PidFile /run/sshd.pid
UsePAM no
UseDNS no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
# The default's post-quantum exchange costs 70 ms of processor time at each of the suite's thousands of logins.
KexAlgorithms curve25519-sha256
MaxSessions 100
MaxStartups 100
LogLevel VERBOSE
Subsystem sftp internal-sftp
CONF
}

write_libvirt() {
  cat >"$1/qemu.conf" <<'CONF'
user = "root"
group = "root"
security_driver = "none"
# There is no systemd and no cgroup tree in a lab host, and QEMU sees the host's own /dev.
cgroup_controllers = []
namespaces = []
CONF
  # Without a UUID of their own both hosts would take the machine's, and libvirt would call them the same host.
  cat >"$1/libvirtd.conf" <<CONF
host_uuid = "$(cat /proc/sys/kernel/random/uuid)"
auth_unix_rw = "none"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
CONF
  echo 'uri_default = "qemu:///system"' >"$1/libvirt.conf"
  : >"$1/virtlogd.conf"
}

# Each host knows the other's key beforehand, under every name: ssh never has a reason to ask.
make_keys() {
  local host root other
  for host in "${LAB_HOSTS[@]}"; do
    root=$VR_LAB_DIR/host/$host
    mkdir -m 700 "$root/root/.ssh"
    ssh-keygen -q -t ed25519 -N '' -C "lab-$host" -f "$root/etc/ssh/ssh_host_ed25519_key"
    ssh-keygen -q -t ed25519 -N '' -C "root@lab-$host" -f "$root/root/.ssh/id_ed25519"
  done
  for host in "${LAB_HOSTS[@]}"; do
    for other in "${LAB_HOSTS[@]}"; do
      printf '%s,%s,%s %s\n' "$(address "$other")" "$other" "lab-$other" \
        "$(cut -d' ' -f1,2 "$VR_LAB_DIR/host/$other/etc/ssh/ssh_host_ed25519_key.pub")" \
        >>"$VR_LAB_DIR/host/$host/root/.ssh/known_hosts"
      cat "$VR_LAB_DIR/host/$other/root/.ssh/id_ed25519.pub" >>"$VR_LAB_DIR/host/$host/root/.ssh/authorized_keys"
    done
  done
}

enter_root() { # runs inside the new namespaces, as the host's PID 1
  local host=$1 root=$VR_LAB_DIR/host/$1 entry
  # The holder may have been killed before its child had asked to be killed with it.
  marked "$VR_LAB_DIR/holder-$host" >/dev/null || die "the holder is gone"
  hostname "lab-$host"
  mount --bind "$root" "$root"
  for entry in usr bin sbin lib lib32 lib64 libx32; do
    [[ ! -d $root/$entry || -L $root/$entry ]] || bind_read_only "/$entry" "$root/$entry"
  done
  mount --rbind /dev "$root/dev"
  mount -t devpts -o mode=620,ptmxmode=666 devpts "$root/dev/pts"
  mount -t proc proc "$root/proc"
  mount -t sysfs sysfs "$root/sys"
  mount -t tmpfs -o mode=755 tmpfs "$root/run"
  mount --bind "$root/lab/bin" "$root/usr/local/bin"
  mount --bind "$VR_LAB_DIR/shared" "$root/lab/shared"
  bind_read_only "$(cache_dir)" "$root/lab/guest"
  bind_read_only "$LAB_HOME" "$root/lab/tools"
  cd "$root"
  pivot_root . old
  umount -l old
  exec chroot . /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/root LANG=C.UTF-8 /bin/bash /lab/tools/lib/init.sh
}

bind_read_only() {
  mount --bind "$1" "$2"
  mount -o remount,bind,ro "$2"
}
