package config

import (
	"log/slog"

	"github.com/spf13/pflag"
)

// ShowFeatureGates sets kubernetes_feature_enabled for every known feature
// gate, in the registry of the Kubernetes libraries.
func (c *Config) ShowFeatureGates() { gatesWith(c.KubeProxy.FeatureGates).AddMetrics() }

// Values are what the flags say, by name.
func (f *Flags) Values() map[string]string {
	all := map[string]string{}
	for _, group := range f.Groups().FlagSets {
		group.VisitAll(func(flag *pflag.Flag) { all[flag.Name] = flag.Value.String() })
	}
	return all
}

// Adjustable returns l as one whose verbosity can be set later.
func (l Logging) Adjustable() Logging {
	l.level = new(slog.LevelVar)
	return l
}

// SetVerbosity changes how much is logged from now on by the Handler of an
// Adjustable Logging.
func (l Logging) SetVerbosity(v int) {
	if v >= debugFrom {
		l.level.Set(slog.LevelDebug)
	} else {
		l.level.Set(slog.LevelInfo)
	}
}
