#!/usr/bin/env bash
# A Debian package with tierd, what it runs with, and its units: packaging/deb.sh PYTHON WHEEL FOLDER
#
# PYTHON (with pip) must be of the minor version that the target has: the package holds compiled modules for it, in an environment
# of their own, /usr/lib/tierd, so that nothing of the system's Python is touched. The package is named on standard output.
set -euo pipefail

python=$1 wheel=$2 folder=$3
here=$(cd "$(dirname "$0")/.." && pwd)
prefix=/usr/lib/tierd
version=$(basename "$wheel" | cut -d- -f2)
minor=$("$python" -c 'import sys; print(sys.version_info.minor)')
architecture=$(dpkg --print-architecture)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"

"$python" -m pip --disable-pip-version-check --quiet install --no-deps --no-compile --no-warn-script-location \
    --root "$root" --prefix "$prefix" -r "$here/requirements/runtime.txt" "$wheel"

# What `python3 -m venv` makes, for the target's interpreter.
printf 'home = /usr/bin\ninclude-system-site-packages = false\n' >"$root$prefix/pyvenv.cfg"
ln -s /usr/bin/python3 "$root$prefix/bin/python3"
ln -s python3 "$root$prefix/bin/python"
find "$root$prefix/bin" -type f ! -name tierd -delete # what needs torch, and numpy's own
sed -i "1s|.*|#!$prefix/bin/python3|" "$root$prefix/bin/tierd"

# What people and their tools look for elsewhere: man pages, dashboards with rules and runbook, completions.
install -d "$root/usr/share/tierd"
mv "$root$prefix/share/man" "$root/usr/share/man"
gzip -9n "$root"/usr/share/man/man1/*
mv "$root$prefix/share/tierd/dashboards" "$root/usr/share/tierd/dashboards"
for file in bash-completion/completions/tierd zsh/vendor-completions/_tierd fish/vendor_completions.d/tierd.fish; do
    install -d "$root/usr/share/${file%/*}"
    PYTHONPATH="$root$prefix/lib/python3.$minor/site-packages" PYTHONDONTWRITEBYTECODE=1 \
        "$python" -m tierd completion "${file%%[-/]*}" >"$root/usr/share/$file"
done

install -d "$root/usr/bin"
ln -s "$prefix/bin/tierd" "$root/usr/bin/tierd"
for unit in tierd.service tierd.socket tierd-metrics.socket; do
    install -D -m 644 -t "$root/usr/lib/systemd/system" "$here/systemd/$unit"
done
install -D -m 644 "$here/systemd/sysusers.conf" "$root/usr/lib/sysusers.d/tierd.conf"
install -D -m 644 "$here/systemd/tmpfiles.conf" "$root/usr/lib/tmpfiles.d/tierd.conf"
install -D -m 644 -t "$root/etc/tierd" "$here/systemd/tierd.toml"
install -D -m 644 -t "$root/usr/share/doc/tierd/examples" "$here/examples/first_hit.py"
install -D -m 644 "$here/LICENSE" "$root/usr/share/doc/tierd/copyright"
install -D -m 644 -t "$root/usr/share/doc/tierd" "$here/CHANGELOG.md"

install -d "$root/DEBIAN"
sed "s/@version@/$version/; s/@architecture@/$architecture/; s/@python@/3.$minor/; s/@next_python@/3.$((minor + 1))/" \
    "$here/packaging/debian/control" >"$root/DEBIAN/control"
install -m 644 -t "$root/DEBIAN" "$here/packaging/debian/conffiles"
install -m 755 -t "$root/DEBIAN" "$here/packaging/debian/"{postinst,prerm,postrm}

dpkg-deb --root-owner-group -Zzstd --build "$root" "$folder/tierd_${version}_$architecture.deb" >&2
echo "$folder/tierd_${version}_$architecture.deb"
