package ipvs

import (
	"errors"
	"slices"
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
