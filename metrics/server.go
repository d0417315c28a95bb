// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/pprof"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/component-base/metrics/prometheus/slis"
	kubeproxyconfigv1alpha1 "k8s.io/kube-proxy/config/v1alpha1"

	"signalbox/internal/buildinfo"
)

// Pages is the content of the metrics server's other pages.
type Pages struct {
	// Mode is the running mode.
	Mode string
	// Config is what /configz shows.
	Config *kubeproxyconfigv1alpha1.KubeProxyConfiguration
	// Flags are the values of the command line's flags, without dashes, for
	// /flagz.
	Flags map[string]string
	// More are other pages, by path. Each serves what is below its path, too.
	More map[string]http.Handler
	// Profiling serves /debug.
	Profiling bool
	// SetVerbosity changes how much is logged (-v); nil: it cannot be changed.
	SetVerbosity func(int)
	// Started is the start of this process, for /statusz.
	Started time.Time
}

// Mux serves all paths of the metrics server.
func (m *Metrics) Mux(p Pages) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", m.Handler())
	slis.SLIMetricsWithReset{}.Install(mux)
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { writeText(w, "ok") })
	mux.HandleFunc("/proxyMode", func(w http.ResponseWriter, _ *http.Request) { writeText(w, p.Mode) })
	mux.HandleFunc("/configz", p.configz)
	mux.HandleFunc("/statusz", p.statusz)
	mux.HandleFunc("/flagz", p.flagz)
	for path, page := range p.More {
		mux.Handle(path, page)
		mux.Handle(path+"/", page)
	}
	if p.Profiling {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
		mux.HandleFunc("/debug/flags/v", p.verbosity)
	}
	return mux
}

// writeText answers a program; writePage answers a person.
func writeText(w http.ResponseWriter, text string) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	writePage(w, text)
}

func writePage(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, text)
}

// configz shows the configuration below the name of its API group.
func (p *Pages) configz(w http.ResponseWriter, _ *http.Request) {
	body, err := json.Marshal(map[string]any{kubeproxyconfigv1alpha1.GroupName: p.Config})
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_, _ = w.Write(body)
}

// component is the name that tools expect.
const component = "kube-proxy"

// pageHead begins /statusz and /flagz (KEP-4827, KEP-4828).
const pageHead = `
%s %s
Warning: This endpoint is not meant to be machine parseable, has no formatting compatibility guarantees and is for debugging purposes only.
`

func (p *Pages) statusz(w http.ResponseWriter, _ *http.Request) {
	up := time.Since(p.Started).Truncate(time.Second)
	lines := [][2]string{
		{"Started", p.Started.Format(time.UnixDate)},
		{"Up", fmt.Sprintf("%d hr %02d min %02d sec", int(up.Hours()), int(up.Minutes())%60, int(up.Seconds())%60)},
		{"Go version", runtime.Version()},
		{"Binary version", strings.TrimPrefix(buildinfo.Release(), "v")},
		{"Emulation version", strings.TrimPrefix(strings.Join(strings.Split(buildinfo.Kubernetes, ".")[:2], "."), "v")},
		{"Paths", strings.Join(p.paths(), " ")},
	}
	var b strings.Builder
	fmt.Fprintf(&b, pageHead+"\n", component, "statusz")
	for _, l := range lines {
		fmt.Fprintf(&b, "%s: %s\n", l[0], l[1])
	}
	writePage(w, b.String())
}

func (p *Pages) paths() []string {
	paths := slices.AppendSeq([]string{"/configz", "/flagz", "/healthz", "/metrics", "/metrics/slis", "/proxyMode"}, maps.Keys(p.More))
	if p.Profiling {
		paths = append(paths, "/debug/flags/v", "/debug/pprof")
	}
	slices.Sort(paths)
	return paths
}

func (p *Pages) flagz(w http.ResponseWriter, _ *http.Request) {
	var b strings.Builder
	fmt.Fprintf(&b, pageHead, component, "flagz")
	for _, name := range slices.Sorted(maps.Keys(p.Flags)) {
		fmt.Fprintf(&b, "%s=%s\n", name, p.Flags[name])
	}
	writePage(w, b.String())
}

// verbosity sets the verbosity of the log to the number in the body of a PUT.
func (p *Pages) verbosity(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPut {
		http.Error(w, "a PUT with a number sets the verbosity", http.StatusNotAcceptable)
		return
	}
	text, err := io.ReadAll(io.LimitReader(r.Body, 16))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	v, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || p.SetVerbosity == nil {
		http.Error(w, fmt.Sprintf("the verbosity cannot be set to %q", text), http.StatusBadRequest)
		return
	}
	p.SetVerbosity(v)
	writeText(w, fmt.Sprintf("successfully set the verbosity to %d", v))
}
