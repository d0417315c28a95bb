// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// A daemon follows the sources that the node's routes name, and says how many of
// them are too many.
func TestRouteSources(t *testing.T) {
	binary, source, host := build(t), manifests(t), newNode(t)
	parse := func(cidr string) *net.IPNet {
		ip, n, err := net.ParseCIDR(cidr)
		if err != nil {
			t.Fatal(err)
		}
		return &net.IPNet{IP: ip, Mask: n.Mask}
	}
	var link netlink.Link
	must := func(fn func() error) {
		t.Helper()
		if err := host.Do(fn); err != nil {
			t.Fatal(err)
		}
	}
	route := func(to string) *netlink.Route {
		return &netlink.Route{LinkIndex: link.Attrs().Index, Dst: parse(to), Src: net.ParseIP("192.0.2.7")}
	}
	must(func() (err error) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "uplink"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}); err != nil {
			return err
		}
		if link, err = netlink.LinkByName("uplink"); err != nil {
			return err
		}
		for _, a := range []string{"192.0.2.1/24", "192.0.2.7/24"} {
			if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: parse(a)}); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		return netlink.RouteAdd(route("10.9.0.0/16"))
	})
	rewrites := func() (rules string) {
		must(func() error {
			out, _ := exec.Command("nft", "list", "chain", "ip", "signalbox", "new-source").CombinedOutput()
			rules = string(out)
			return nil
		})
		return rules
	}
	const healthz, metrics = "http://127.0.0.1:10256/healthz", "http://127.0.0.1:10249/metrics"

	d := startDaemon(t, host, binary, source)
	d.answers(healthz, 200)
	// /healthz can answer before the first sync.
	eventually(t, "the first sync writes the rule for the route", func() bool {
		return strings.Contains(rewrites(), `oifname "uplink" ip daddr 10.9.0.0/16 snat to 192.0.2.7 fully-random`)
	})
	d.answers(metrics, 200, "signalbox_route_sources_left_out 0\n")
	each := func(fn func(*netlink.Route) error) {
		t.Helper()
		must(func() error {
			for i := range 299 {
				if err := fn(route(fmt.Sprintf("11.%d.%d.0/24", i/256, i%256))); err != nil {
					return err
				}
			}
			return nil
		})
	}
	each(netlink.RouteAdd)
	d.answers(metrics, 200, "signalbox_route_sources_left_out 44\n")
	d.answers(healthz, 200, `"conditions":["44 source addresses of routes are not used, among them uplink to 11.`)
	each(netlink.RouteDel)
	must(func() error { return netlink.RouteDel(route("10.9.0.0/16")) })
	d.answers(metrics, 200, "signalbox_route_sources_left_out 0\n")
	eventually(t, "the rules are those of an ordinary node", func() bool { return strings.Contains(rewrites(), "No such file") })
	d.stop()
}
