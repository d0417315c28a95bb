// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"signalbox/internal/netlab"
	"signalbox/proxier/plan"
)

// symbols are the names that a scenario uses instead of addresses, so that it
// is written once for both families:
//
//	$node1 $node2 $client1 $client2 $pod-a ...  the hosts of the lab
//	$node1b                one more address for node1, which it lacks at first
//	$tunnel1               node1's address on the overlay
//	$vip1 ... $vip9        cluster IPs; $newvip1 ... lie in another range
//	$lb1 ... $lb9          load-balancer IPs, $ext1 ... $ext9 external IPs
//	$localhost             127.0.0.1 or ::1
//	$podCIDR $podCIDR2 $clusterCIDR $serviceCIDR $newServiceCIDR $externalCIDR
//	$nodeNet $clientNet1 $clientNet2 $everyone   ranges
//	$family                IPv4 or IPv6
//	$hostbits              32 or 128
//
// "@IPv4", "@IPv6" or "@other" after a name picks the family.
type symbols struct {
	family plan.Family
	lab    *netlab.Lab
	words  map[string]string // set by a scenario while it runs
}

var symbolPattern = regexp.MustCompile(`\$([A-Za-z][A-Za-z0-9-]*)(@[A-Za-z0-9]+)?`)

// expand replaces every symbol in a text.
func (s *symbols) expand(text string) (string, error) {
	var failed error
	out := symbolPattern.ReplaceAllStringFunc(text, func(symbol string) string {
		m := symbolPattern.FindStringSubmatch(symbol)
		family, err := s.pick(strings.TrimPrefix(m[2], "@"))
		if err == nil {
			var word string
			if word, err = s.lookup(m[1], family); err == nil {
				return word
			}
		}
		if failed == nil {
			failed = fmt.Errorf("%s: %w", symbol, err)
		}
		return symbol
	})
	return out, failed
}

func (s *symbols) pick(name string) (plan.Family, error) {
	switch name {
	case "":
		return s.family, nil
	case "IPv4":
		return plan.IPv4, nil
	case "IPv6":
		return plan.IPv6, nil
	case "other":
		if s.family == plan.IPv4 {
			return plan.IPv6, nil
		}
		return plan.IPv4, nil
	}
	return 0, fmt.Errorf("%q is no family; there are IPv4, IPv6 and other", name)
}

func (s *symbols) lookup(name string, family plan.Family) (string, error) {
	if w, ok := s.words[name]; ok {
		return w, nil
	}
	if h := s.lab.Host(name); h != nil {
		return ofFamily(h.Addr, family).String(), nil
	}
	switch name {
	case "family":
		return family.String(), nil
	case "hostbits":
		return strconv.Itoa(family.HostBits()), nil
	case "localhost":
		if family == plan.IPv6 {
			return "::1", nil
		}
		return "127.0.0.1", nil
	case "tunnel1":
		return rangeOf(netlab.NodePodNetwork("node1"), family).Addr().String(), nil
	case "node1b":
		return nthAddr(rangeOf(netlab.NodeNetwork, family).Addr(), 111).String(), nil
	}
	if p, ok := ranges[name]; ok {
		return rangeOf(p, family).String(), nil
	}
	for prefix, network := range numbered {
		if n, err := strconv.Atoi(strings.TrimPrefix(name, prefix)); err == nil && n >= 1 && n <= 9 {
			return nthAddr(rangeOf(network.in, family).Addr(), network.first+n).String(), nil
		}
	}
	return "", errors.New("there is no such name")
}

var ranges = map[string]netlab.PrefixPair{
	"clusterCIDR":    netlab.PodNetwork,
	"podCIDR":        netlab.NodePodNetwork("node1"),
	"podCIDR2":       netlab.NodePodNetwork("node2"),
	"serviceCIDR":    netlab.ServiceNetwork,
	"newServiceCIDR": netlab.ServiceNetwork2,
	"externalCIDR":   netlab.ExternalNetwork,
	"nodeNet":        netlab.NodeNetwork,
	"clientNet1":     netlab.ClientNetwork,
	"clientNet2":     netlab.ClientNetwork2,
	"everyone":       {V4: netip.MustParsePrefix("0.0.0.0/0"), V6: netip.MustParsePrefix("::/0")},
}

// numbered are the names that end in a digit from 1 to 9: the first one stands
// for the address after first.
var numbered = map[string]struct {
	in    netlab.PrefixPair
	first int
}{
	"vip":    {netlab.ServiceNetwork, 10},
	"newvip": {netlab.ServiceNetwork2, 10},
	"lb":     {netlab.ExternalNetwork, 0},
	"ext":    {netlab.ExternalNetwork, 100},
}

func ofFamily(p netlab.Pair, family plan.Family) netip.Addr {
	if family == plan.IPv6 {
		return p.V6
	}
	return p.V4
}

func rangeOf(p netlab.PrefixPair, family plan.Family) netip.Prefix {
	if family == plan.IPv6 {
		return p.V6
	}
	return p.V4
}

// target reads "address:port" as a script writes it, without brackets.
func target(text string) (netip.AddrPort, error) {
	i := strings.LastIndexByte(text, ':')
	if i < 0 {
		return netip.AddrPort{}, fmt.Errorf("%q is not address:port", text)
	}
	a, err := netip.ParseAddr(text[:i])
	if err != nil {
		return netip.AddrPort{}, err
	}
	port, err := strconv.ParseUint(text[i+1:], 10, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not a port", text[i+1:])
	}
	return netip.AddrPortFrom(a, uint16(port)), nil
}
