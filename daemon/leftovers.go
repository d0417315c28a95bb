package daemon

import (
	"errors"
	"log/slog"

	"signalbox/modes"
	"signalbox/proxier"
)

// clearLeftovers removes what other modes, of an earlier signalbox or of a
// kube-proxy, left in the kernel for a family. It is called once this mode
// serves the family: new connections find the new rules first and the old ones
// gone after, never neither.
func clearLeftovers(current modes.Mode, family proxier.Family, log *slog.Logger) {
	for _, other := range modes.All {
		if other.Name == current.Name {
			continue
		}
		err := other.Cleanup(family)
		var unsupported *proxier.UnsupportedError
		switch {
		case errors.As(err, &unsupported):
			log.Debug("another mode cannot have left anything", "mode", other.Name, "reason", err)
		case err != nil:
			log.Warn("what another mode left could not be removed; its rules may still be obeyed", "mode", other.Name, "family", family.String(), "error", err)
		}
	}
}
