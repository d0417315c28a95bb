package ipvs

import (
	"bytes"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"signalbox/proxier"
)

// TestSchedulerOf checks which scheduler Services have with a kernel that lacks
// some, and how often it is asked.
func TestSchedulerOf(t *testing.T) {
	w := world{proxier.IPv4}
	kernel := []string{"lc", "wrr", "sh"}
	var asked []string
	ask := func(name string) (bool, error) {
		asked = append(asked, name)
		if name == "mute" {
			return false, errors.New("no answer")
		}
		return slices.Contains(kernel, name), nil
	}
	port := func(scheduler string, weight uint16) *proxier.ServicePort {
		set := w.pods(1, 2)
		set.Endpoints[1].Weight = weight
		sp := w.service("web", proxier.TCP, set, local(proxier.NodePort, w.vip(1), 80, w.pods(1), set))
		sp.Scheduler = scheduler
		return sp
	}
	for _, test := range []struct {
		own, asks string
		weight    uint16
		want      string
	}{
		{"", "", 0, "rr"},
		{"", "", 1, "rr"},
		{"", "", 2, "wrr"},
		{"", "rr", 2, "rr"},
		{"", "sh", 2, "sh"},
		{"", "mh", 0, "rr"},
		{"", "mh", 2, "wrr"},
		{"lc", "", 0, "lc"},
		{"lc", "", 2, "lc"}, // there is no wlc
		{"sh", "", 2, "sh"},
		{"", "mute", 0, "mute"},
	} {
		if got := newSchedulers(test.own, ask).of(port(test.asks, test.weight)); got != test.want {
			t.Errorf("flag %q, annotation %q, weight %d: %s, not %s", test.own, test.asks, test.weight, got, test.want)
		}
	}
	s := newSchedulers("", ask)
	asked = nil
	for range 3 {
		s.of(port("mh", 2))
	}
	if want := []string{"mh", "wrr"}; !slices.Equal(asked, want) {
		t.Errorf("asked for %v, not %v", asked, want)
	}
	kernel = append(kernel, "mh")
	s.forgetMissing()
	if got := s.of(port("mh", 2)); got != "mh" {
		t.Errorf("after its module was loaded: %s", got)
	}
	if len(asked) != 3 {
		t.Errorf("asked for %v", asked)
	}
}

// TestMissingSchedulerIsToldOnce checks that the log tells once of a Service's
// scheduler that the kernel has not got, until something about it changes.
func TestMissingSchedulerIsToldOnce(t *testing.T) {
	var log bytes.Buffer
	defer slog.SetDefault(slog.Default())
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	kernel := map[string]bool{}
	ask := func(name string) (bool, error) { return kernel[name], nil }
	shared := &toldSchedulers{}
	v4, v6 := newSchedulers("", ask), newSchedulers("", ask)
	v4.told, v6.told = shared, shared
	port := func(family proxier.Family, service, name, scheduler string) *proxier.ServicePort {
		w := world{family}
		sp := w.service(service, proxier.TCP, w.pods(1), clusterIP(w.vip(1), 80, w.pods(1)))
		sp.Name.Port, sp.Scheduler = name, scheduler
		return sp
	}
	told := func(step string, want int) {
		t.Helper()
		if n := strings.Count(log.String(), "service=default/"); n != want {
			t.Errorf("%s: told %d times, not %d:\n%s", step, n, want, log.String())
		}
		log.Reset()
	}
	for range 3 {
		v4.of(port(proxier.IPv4, "web", "http", "mh"))
		v4.of(port(proxier.IPv4, "web", "https", "mh"))
		v6.of(port(proxier.IPv6, "web", "http", "mh"))
		v4.forgetMissing()
	}
	told("a Service of two ports and families", 1)
	v4.of(port(proxier.IPv4, "other", "http", "mh"))
	told("another Service", 1)
	v4.of(port(proxier.IPv4, "web", "http", "sed"))
	told("another scheduler", 1)
	v4.of(port(proxier.IPv4, "web", "http", ""))
	v4.of(port(proxier.IPv4, "web", "http", "sed"))
	told("asked for again", 1)
	kernel["sed"] = true
	v4.forgetMissing()
	v4.of(port(proxier.IPv4, "web", "http", "sed"))
	told("loaded", 0)
	gone := port(proxier.IPv4, "other", "http", "mh")
	v4.forgetGone(world{proxier.IPv4}.plan(), slices.Values([]proxier.ServicePortName{gone.Name}))
	v4.of(gone)
	told("made again", 1)
}
