// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bufio"
	"bytes"
	"fmt"
	"hash/maphash"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"signalbox/proxier/plan"
)

// listingFile lists all virtual servers and destinations of the thread's network namespace.
// Netlink lists destinations for one virtual server at a time.
const listingFile = "/proc/thread-self/net/ip_vs"

// Server is a virtual server in the listing.
type Server struct {
	Scheduler    string
	Destinations []Destination
}

// Listing lists the virtual servers of the family with their destinations. Some virtual
// servers may be missing, but a listed server has all its destinations: the file is read in
// pieces, and each piece begins with a server. The kernel (6.1) finds the wrong beginning if
// servers change meanwhile, or if other network namespaces have servers. Servers by mark
// without destinations are always missing.
func (h *IPVS) Listing() (map[ServerKey]Server, error) {
	if h.listing == nil {
		return nil, nil
	}
	if _, err := h.listing.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return parseListing(h.listing, h.family)
}

// digestSeed makes the sums of one process.
var digestSeed = maphash.MakeSeed()

// Digest is a sum of the virtual servers, destinations and weights of both families and of
// all software in the network namespace. It costs a tenth of Listing. Without the
// file it is always 0.
func (h *IPVS) Digest() (digest uint64, err error) {
	if h.listing == nil {
		return 0, nil
	}
	if _, err := h.listing.Seek(0, io.SeekStart); err != nil {
		return 0, err
	}
	return digestOf(h.listing)
}

// digestOf adds the servers, and the destinations with their server and without their
// connections. So the order does not count.
func digestOf(text io.Reader) (digest uint64, err error) {
	var line []byte // a server, and then a destination
	server := 0     // length of the server
	lines := bufio.NewScanner(text)
	for lines.Scan() {
		if !bytes.HasPrefix(lines.Bytes(), []byte("  ->")) {
			line = append(line[:0], lines.Bytes()...)
			server = len(line)
		} else {
			line = append(line[:server], withoutColumns(lines.Bytes(), 2)...)
		}
		digest += maphash.Bytes(digestSeed, line)
	}
	return digest, lines.Err()
}

// withoutColumns cuts the last columns off.
func withoutColumns(line []byte, columns int) []byte {
	for range columns {
		line = bytes.TrimRight(line, " ")
		line = line[:bytes.LastIndexByte(line, ' ')+1]
	}
	return line
}

// openListing returns nil if there is no such file. Netlink then lists the destinations.
func openListing() *os.File {
	f, err := os.Open(listingFile)
	if err != nil {
		return nil
	}
	return f
}

// parseListing reads lines like these, with hexadecimal addresses and ports:
//
//	TCP  0A600001:0050 rr
//	  -> 0AF40105:1F90      Masq    1      0          0
//	UDP  [fd00:0096:0000:0000:0000:0000:0000:0001]:0035 wrr
//	FWM  40000001 rr
//
// Only the destinations of a server by mark show its family.
func parseListing(text io.Reader, family plan.Family) (map[ServerKey]Server, error) {
	found := make(map[ServerKey]Server)
	var key ServerKey
	var scheduler string
	known := false // key could be parsed
	lines := bufio.NewScanner(text)
	for n := 0; lines.Scan(); n++ {
		words := strings.Fields(lines.Text())
		switch {
		case n < 3 || len(words) < 3: // the heading
		case words[0] != "->":
			if key, known = parseServer(words[0], words[1]); !known {
				continue
			}
			scheduler = schedulerText(words[2], listedFlags(words[2:]))
			if key.Mark == 0 && plan.FamilyOf(key.Addr) == family {
				found[key] = Server{Scheduler: scheduler}
			}
		case known:
			d, err := parseDest(words)
			if err != nil {
				return nil, fmt.Errorf("%s: line %d: %w", listingFile, n+1, err)
			}
			if plan.FamilyOf(d.Addr.Addr()) == family {
				found[key] = Server{scheduler, append(found[key].Destinations, d)}
			}
		}
	}
	return found, lines.Err()
}

// listedFlags reads a scheduler and the words behind it. The kernel lists no flags of the
// scheduler, and no "ops" for an IPv6 address.
func listedFlags(words []string) uint32 {
	flags := flagsOf(words[0])
	if slices.Contains(words, "persistent") {
		flags |= servicePersistent
	}
	if slices.Contains(words, "ops") {
		flags |= serviceOnePacket
	}
	return flags
}

func parseServer(protocol, at string) (ServerKey, bool) {
	if protocol == "FWM" {
		mark, err := strconv.ParseUint(at, 16, 32)
		return ServerKey{Mark: uint32(mark)}, err == nil
	}
	for _, p := range plan.Protocols {
		if strings.EqualFold(p.String(), protocol) {
			a, err := parseHexAddrPort(at)
			return ServerKey{Addr: a.Addr(), Port: a.Port(), Protocol: p}, err == nil
		}
	}
	return ServerKey{}, false
}

func parseDest(words []string) (d Destination, err error) {
	if len(words) < 6 {
		return d, fmt.Errorf("%q is not a destination", words)
	}
	if d.Addr, err = parseHexAddrPort(words[1]); err != nil {
		return d, err
	}
	var numbers [3]int
	for i := range numbers {
		if numbers[i], err = strconv.Atoi(words[3+i]); err != nil {
			return d, err
		}
	}
	d.Weight, d.Connections = numbers[0], numbers[1]+numbers[2]
	d.Method, err = parseMethod(words[2])
	return d, err
}

func parseMethod(name string) (Method, error) {
	for m := range methods {
		if methods[m].name == name {
			return Method(m), nil
		}
	}
	return 0, fmt.Errorf("%q is not a forwarding method", name)
}

func parseHexAddrPort(text string) (netip.AddrPort, error) {
	i := strings.LastIndexByte(text, ':')
	if i < 0 {
		return netip.AddrPort{}, fmt.Errorf("%q is not an address and port", text)
	}
	port, err := strconv.ParseUint(text[i+1:], 16, 16)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if long, found := strings.CutPrefix(text[:i], "["); found {
		a, err := netip.ParseAddr(strings.TrimSuffix(long, "]"))
		return netip.AddrPortFrom(a, uint16(port)), err
	}
	v4, err := strconv.ParseUint(text[:i], 16, 32)
	a := netip.AddrFrom4([4]byte{byte(v4 >> 24), byte(v4 >> 16), byte(v4 >> 8), byte(v4)})
	return netip.AddrPortFrom(a, uint16(port)), err
}
