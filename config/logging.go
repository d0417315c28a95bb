// SPDX-License-Identifier: Apache-2.0

package config

import (
	"io"
	"log/slog"
	"sync"

	"github.com/go-logr/logr"
	"github.com/spf13/pflag"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
)

// Logging configures the log.
type Logging struct {
	// Format is "text" or "json".
	Format string
	// Verbosity is kube-proxy's number for how much is logged.
	Verbosity int

	level *slog.LevelVar // nil if not Adjustable
}

// debugFrom is the verbosity from which every sync is logged. slog has one
// level below Info; kube-proxy's numbers are folded onto the two.
const debugFrom = 2

// Handler writes the log to w as Logging says.
func (l Logging) Handler(w io.Writer) slog.Handler {
	opts := &slog.HandlerOptions{Level: slog.LevelInfo}
	if l.Verbosity >= debugFrom {
		opts.Level = slog.LevelDebug
	}
	if l.level != nil {
		l.SetVerbosity(l.Verbosity)
		opts.Level = l.level
	}
	if l.Format == logsapi.JSONLogFormat {
		return slog.NewJSONHandler(w, opts)
	}
	return slog.NewTextHandler(w, opts)
}

// Adjustable returns l with a verbosity that SetVerbosity can change later.
func (l Logging) Adjustable() Logging {
	l.level = new(slog.LevelVar)
	return l
}

// SetVerbosity changes the verbosity of an Adjustable Logging's Handler.
func (l Logging) SetVerbosity(v int) {
	l.level.Set(slog.LevelInfo)
	if v >= debugFrom {
		l.level.Set(slog.LevelDebug)
	}
}

// addLogging registers the flags that every component of Kubernetes has.
func addLogging(l *logsapi.LoggingConfiguration, fs *pflag.FlagSet) {
	registerJSON()
	logsapi.AddFlags(l, fs)
}

// registerJSON makes json a format that the Kubernetes libraries know. They
// would bring a logger of their own for it, which nothing here uses.
var registerJSON = sync.OnceFunc(func() {
	if err := logsapi.RegisterLogFormat(logsapi.JSONLogFormat, jsonFormat{}, logsapi.LoggingBetaOptions); err != nil {
		panic(err) // registered twice: a mistake in this program
	}
})

type jsonFormat struct{}

func (jsonFormat) Create(c logsapi.LoggingConfiguration, o logsapi.LoggingOptions) (logr.Logger, logsapi.RuntimeControl) {
	l := Logging{Format: c.Format, Verbosity: int(c.Verbosity)}
	return logr.FromSlogHandler(l.Handler(o.ErrorStream)), logsapi.RuntimeControl{}
}

// copyLogging lets the given logging flags override a file, as kube-proxy does.
// Patterns are an exception: the file's follow the flag's.
func (f *Flags) copyLogging(k *v1alpha1.KubeProxyConfiguration) {
	patterns := k.Logging.VModule
	k.Logging.VModule = nil
	var over pflag.FlagSet
	logsapi.AddFlags(&k.Logging, &over)
	f.groups.FlagSet(groupLogging).VisitAll(func(flag *pflag.Flag) {
		if flag.Changed {
			_ = over.Set(flag.Name, flag.Value.String()) // the same type took it before
		}
	})
	k.Logging.VModule = append(k.Logging.VModule, patterns...)
}

// loggingWithoutEffect names the logging settings that have no effect.
func loggingWithoutEffect(l *logsapi.LoggingConfiguration) []string {
	var out []string
	for what, asked := range map[string]bool{
		"--vmodule: its patterns are names of kube-proxy's files":         len(l.VModule) > 0,
		"--log-flush-frequency: every line of the log is written at once": l.FlushFrequency.Duration.Duration != logsapi.LogFlushFreqDefault,
		"splitting the log's stream: all of it goes to standard error":    l.Options.Text.SplitStream || l.Options.JSON.SplitStream,
	} {
		if asked {
			out = append(out, "no effect: "+what)
		}
	}
	return out
}
