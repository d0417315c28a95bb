// SPDX-License-Identifier: Apache-2.0

package access

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"signalbox/nft"
	"signalbox/proxier/plan"
)

func TestValidatePort(t *testing.T) {
	set := func(endpoint string) *plan.EndpointSet {
		return &plan.EndpointSet{Endpoints: []plan.Endpoint{{AddrPort: netip.MustParseAddrPort(endpoint)}}}
	}
	good := plan.Frontend{Addr: netip.MustParseAddr("10.96.0.1"), Port: 80, Internal: set("10.244.1.1:8080"), External: set("10.244.1.1:8080")}
	for want, change := range map[string]func(*plan.ServicePort){
		"":                          func(*plan.ServicePort) {},
		"not in whole seconds":      func(p *plan.ServicePort) { p.AffinityTimeout = time.Second / 2 },
		"is not an IPv4 address":    func(p *plan.ServicePort) { p.Frontends[0].Addr = netip.MustParseAddr("fd00::1") },
		"has port 0":                func(p *plan.ServicePort) { p.Frontends[0].Port = 0 },
		"lacks an endpoint set":     func(p *plan.ServicePort) { p.Frontends[0].External = nil },
		"is not of IPv4":            func(p *plan.ServicePort) { p.Frontends[0].Sources = []netip.Prefix{netip.MustParsePrefix("fd00::/8")} },
		"endpoint [fd00::1]:8080":   func(p *plan.ServicePort) { p.Frontends[0].External = set("[fd00::1]:8080") },
		"endpoint 10.244.1.1:0 has": func(p *plan.ServicePort) { p.Frontends[0].External = set("10.244.1.1:0") },
	} {
		port := &plan.ServicePort{Frontends: []plan.Frontend{good}}
		change(port)
		err := ValidatePort(nft.FamilyOf(plan.IPv4), port)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}
