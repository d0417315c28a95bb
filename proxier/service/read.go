// SPDX-License-Identifier: Apache-2.0

package service

import (
	"net/netip"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	netutils "k8s.io/utils/net"

	"signalbox/proxier/plan"
)

// ParseAddr reads an address as the API server does. It still holds objects
// from times when leading zeros ("010.0.0.1") and IPv4-mapped IPv6 addresses
// were allowed; both mean an IPv4 address.
func ParseAddr(text string) (netip.Addr, bool) {
	if a, err := netip.ParseAddr(text); err == nil {
		return a.Unmap(), a.Zone() == ""
	}
	a, ok := netip.AddrFromSlice(netutils.ParseIPSloppy(text))
	return a.Unmap(), ok
}

// ParsePrefix reads a CIDR as the API server does; bits after its length are
// cleared.
func ParsePrefix(text string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		_, ipnet, err := netutils.ParseCIDRSloppy(text)
		if err != nil {
			return netip.Prefix{}, false
		}
		a, _ := netip.AddrFromSlice(ipnet.IP)
		bits, _ := ipnet.Mask.Size()
		p = netip.PrefixFrom(a, bits)
	}
	if a := p.Addr(); a.Is4In6() {
		if p.Bits() < 96 {
			return netip.Prefix{}, false
		}
		p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
	}
	return p.Masked(), true
}

func readAddr(p *plan.Problems, field, text string) (netip.Addr, bool) {
	a, ok := ParseAddr(text)
	if !ok {
		p.Add(field, "%q is not an IP address; it is left out", text)
		return a, false
	}
	if !hostAddr(a) {
		p.Add(field, "%s is a loopback, multicast or unspecified address; it is left out", a)
		return a, false
	}
	return a, true
}

// hostAddr says whether a is an address that a host can have for others.
func hostAddr(a netip.Addr) bool {
	return a.IsValid() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() &&
		a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// routable says whether packets to a can reach a host on another link. The API
// server lets nothing else be an endpoint or an external IP.
func routable(a netip.Addr) bool { return hostAddr(a) && !a.IsLinkLocalUnicast() }

func readPrefixes(p *plan.Problems, field string, texts []string) []netip.Prefix {
	var out []netip.Prefix
	for i, text := range texts {
		prefix, ok := ParsePrefix(text)
		if !ok {
			p.Add(indexed(field, i), "%q is not a CIDR; it is left out", text)
			continue
		}
		out = append(out, prefix)
	}
	return out
}

func validPort(port int32) bool { return port > 0 && port <= 65535 }

// validNames refuses what the API server would: names end up in rules,
// comments and logs. The namespace may be missing.
func validNames(p *plan.Problems, obj metav1.Object, nameErrors func(string) []string) bool {
	namespace := obj.GetNamespace()
	switch {
	case namespace != "" && len(validation.IsDNS1123Label(namespace)) > 0:
		p.Add("metadata.namespace", "%q is not a name that the API allows; the object is left out", namespace)
	case len(nameErrors(obj.GetName())) > 0:
		p.Add("metadata.name", "%q is not a name that the API allows; the object is left out", obj.GetName())
	default:
		return true
	}
	return false
}

// objectName is safe to print, whatever the object calls itself.
func objectName(obj metav1.Object) string {
	name := obj.GetName()
	if obj.GetNamespace() != "" {
		name = obj.GetNamespace() + "/" + name
	}
	return strings.ToValidUTF8(name, "\uFFFD")
}

func indexed(field string, i int) string { return field + "[" + strconv.Itoa(i) + "]" }
