#!/usr/bin/env bash
# Runs the make targets named as arguments one after another, also after one
# that fails. The end lists each with its duration and what failed in it.
set -uo pipefail
make=${MAKE:-make}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'exit 130' INT TERM

summary= failed=0
for stage in "$@"; do
	echo "== $stage"
	began=$SECONDS result=ok
	if ! $make --no-print-directory "$stage" 2>&1 | tee "$log"; then
		result=FAILED failed=1
	fi
	took=$((SECONDS - began))
	summary+=$(printf '%-10s %-6s %3d min %02d s' "$stage" "$result" $((took / 60)) $((took % 60)))$'\n'
	[ "$result" = ok ] || summary+=$(grep -E '^ *--- FAIL: |^FAIL[[:space:]]|^panic: |^make.*\*\*\*' "$log" | sed 's/^/    /')$'\n'
done
printf '== summary, after %d min %02d s\n%s' $((SECONDS / 60)) $((SECONDS % 60)) "$summary"
exit $failed
