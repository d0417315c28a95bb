#!/usr/bin/env bash
# Prints the licences and notices of signalbox, of Go, and of every module that signalbox
# links. Each text stands once, below the packages that have it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
texts=$work/texts
go tool -modfile="$PWD/hack/tools/release/go.mod" go-licenses save ./cmd/signalbox --save_path "$texts" --ignore signalbox \
	--logtostderr=false --log_file=/dev/null --stderrthreshold=ERROR
install -D -m 644 LICENSE "$texts/signalbox/LICENSE"
install -D -m 644 "$(go env GOROOT)/LICENSE" "$texts/go.dev/LICENSE"

cd "$texts"
export LC_ALL=C
find . -type f -printf '%P\n' | sort | xargs sha256sum | awk '
	!($1 in names) { first[$1] = $2; order[++texts] = $1 }
	{ names[$1] = names[$1] $2 "\n" }
	END {
		for (i = 1; i <= texts; i++) {
			text = order[i]
			printf "%s%s\n%s\n", (i > 1 ? "\n\n" : ""), "========", names[text]
			while ((getline line < first[text]) > 0) print line
		}
	}'
