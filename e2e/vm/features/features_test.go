// SPDX-License-Identifier: Apache-2.0

//go:build guest

package features

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/internal/nstest"
)

func TestRelease(t *testing.T) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	want := os.Getenv("SIGNALBOX_VM_RELEASE")
	if got := unix.ByteSliceToString(u.Release[:]); got != want || want == "" {
		t.Errorf("the kernel is %q, not %q", got, want)
	}
}

func TestLinks(t *testing.T) {
	named := func(name string) netlink.LinkAttrs {
		a := netlink.NewLinkAttrs()
		a.Name = name
		return a
	}
	for _, link := range []netlink.Link{
		&netlink.Dummy{LinkAttrs: named("dummy-t")},
		&netlink.Bridge{LinkAttrs: named("bridge-t")},
		&netlink.Veth{LinkAttrs: named("veth-t"), PeerName: "veth-p"},
		&netlink.Vxlan{LinkAttrs: named("vxlan-t"), VxlanId: 1, Port: 8472},
	} {
		t.Run(link.Type(), func(t *testing.T) {
			if err := netlink.LinkAdd(link); err != nil {
				t.Fatal(err)
			}
			if err := netlink.LinkSetUp(link); err != nil {
				t.Error(err)
			}
			if err := netlink.LinkDel(link); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSysctls(t *testing.T) {
	for _, name := range []string{
		"net/bridge/bridge-nf-call-iptables", "net/netfilter/nf_conntrack_max", "net/netfilter/nf_conntrack_tcp_be_liberal",
		"net/ipv4/vs/conntrack", "net/ipv4/vs/conn_reuse_mode", "net/ipv4/vs/expire_nodest_conn", "net/sctp/rto_min",
	} {
		if _, err := os.ReadFile("/proc/sys/" + name); err != nil {
			t.Error(err)
		}
	}
}

// TestSCTP sends a message over an association with itself, in each family.
func TestSCTP(t *testing.T) {
	for name, addr := range map[string]unix.Sockaddr{
		"IPv4": &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}},
		"IPv6": &unix.SockaddrInet6{Addr: [16]byte{15: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			if err := exchange(addr); err != nil {
				t.Error(err)
			}
		})
	}
}

// exchange makes a listener at addr, whose port the kernel chooses, and sends
// it a message.
func exchange(addr unix.Sockaddr) error {
	family := unix.AF_INET
	if _, ok := addr.(*unix.SockaddrInet6); ok {
		family = unix.AF_INET6
	}
	socket := func() (int, error) { return unix.Socket(family, unix.SOCK_STREAM, unix.IPPROTO_SCTP) }
	listener, err := socket()
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(listener)
	if err := errors.Join(unix.Bind(listener, addr), unix.Listen(listener, 1)); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	bound, err := unix.Getsockname(listener)
	if err != nil {
		return err
	}
	client, err := socket()
	if err != nil {
		return err
	}
	defer unix.Close(client)
	if err := unix.Connect(client, bound); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	server, _, err := unix.Accept(listener)
	if err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	defer unix.Close(server)
	message := []byte("over SCTP")
	if _, err := unix.Write(client, message); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	got := make([]byte, 64)
	n, err := unix.Read(server, got)
	if err != nil || !bytes.Equal(got[:n], message) {
		return fmt.Errorf("%q arrived as %q (%v)", message, got[:n], err)
	}
	return nil
}

// TestIPVS makes a virtual server with each scheduler of the kernel.
func TestIPVS(t *testing.T) {
	nstest.Enter(t) // rules that stay would change other tests
	servers := fmt.Sprintf("/proc/self/task/%d/net/ip_vs", unix.Gettid())
	if _, err := netlink.GenlFamilyGet("IPVS"); err != nil {
		t.Errorf("generic netlink family IPVS: %v", err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for i, scheduler := range []string{"rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "fo", "ovf", "mh"} {
		t.Run(scheduler, func(t *testing.T) {
			port := uint16(1000 + i)
			if err := addVirtualServer(fd, port, scheduler); err != nil {
				t.Fatal(err)
			}
			table, err := os.ReadFile(servers)
			if err != nil {
				t.Fatal(err)
			}
			if line := fmt.Sprintf("TCP  0A600001:%04X %s", port, scheduler); !strings.Contains(string(table), line) {
				t.Errorf("no %q in\n%s", line, table)
			}
		})
	}
}

// addVirtualServer adds 10.96.0.1 with a TCP port by the old socket option,
// which needs no library.
func addVirtualServer(fd int, port uint16, scheduler string) error {
	const addService = 64 + 1024 + 64 + 2 // IP_VS_SO_SET_ADD
	server := struct {                    // struct ip_vs_service_user
		Protocol  uint16
		_         uint16
		Addr      [4]byte
		Port      [2]byte
		_         uint16
		Mark      uint32
		Scheduler [16]byte
		Flags     uint32
		Timeout   uint32
		Netmask   uint32
	}{Protocol: unix.IPPROTO_TCP, Addr: [4]byte{10, 96, 0, 1}, Netmask: 1<<32 - 1}
	binary.BigEndian.PutUint16(server.Port[:], port)
	copy(server.Scheduler[:], scheduler)
	var b bytes.Buffer
	if err := binary.Write(&b, binary.NativeEndian, server); err != nil {
		return err
	}
	return unix.SetsockoptString(fd, unix.IPPROTO_IP, addService, b.String())
}

// ruleset uses every kind of expression that a mode could.
const ruleset = `
table inet features {
	map endpoints { typeof ip daddr . meta l4proto . th dport . numgen random mod 4 : ip daddr . th dport; }
	set clients { type ipv4_addr; flags dynamic, timeout; timeout 1h; size 1024; }
	map verdicts { type ipv4_addr . inet_proto . inet_service : verdict; }
	set ranges { type ipv4_addr . inet_service; flags interval; }
	ct timeout short { protocol udp; l3proto ip; policy = { unreplied: 10, replied: 20 }; }
	counter seen { }
	chain prerouting {
		type nat hook prerouting priority dstnat
		fib daddr type local ip daddr . meta l4proto . th dport vmap @verdicts
		meta l4proto tcp dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 4 map @endpoints
		meta l4proto sctp sctp dport 80 dnat ip to 10.0.0.1:8080
		tcp dport 81 redirect to :8081
		ip saddr . tcp dport @ranges counter name seen
	}
	chain divert {
		type filter hook prerouting priority mangle
		meta l4proto tcp socket transparent 1 meta mark set 1 accept
		meta l4proto tcp tproxy ip to 127.0.0.1:8080
		update @clients { ip saddr timeout 1m }
		meta mark set jhash ip saddr mod 2
		ct mark 1 ct zone set 1
	}
	chain postrouting {
		type nat hook postrouting priority srcnat
		meta mark & 0x4000 == 0x4000 masquerade fully-random
		ct status dnat snat ip to 10.0.0.2
	}
	chain filter {
		type filter hook input priority filter
		limit rate 10/second log prefix "x" level debug
		quota over 1 mbytes drop
		meta l4proto tcp reject with tcp reset
		reject with icmpx type port-unreachable
	}
}
`

func TestNFT(t *testing.T) {
	nstest.NFT(t, ruleset, "-f", "-")
	nstest.NFT(t, "", "delete", "table", "inet", "features")
}

// TestIPTables loads rules with the matches and targets that modes use, by
// both kinds of iptables, and reads them back.
func TestIPTables(t *testing.T) {
	for _, kind := range []string{"nft", "legacy"} {
		for program, addr := range map[string]string{"iptables": "10.0.0.1", "ip6tables": "fd00::1"} {
			t.Run(program+"-"+kind, func(t *testing.T) {
				nstest.Enter(t)
				command := program + "-" + kind
				load := exec.Command(command+"-restore", "--noflush", "-w", "5")
				load.Stdin = strings.NewReader(fmt.Sprintf(tables, addr, at(addr)))
				if out, err := load.CombinedOutput(); err != nil {
					t.Fatalf("%v: %v\n%s", load.Args, err, out)
				}
				out, err := exec.Command(command + "-save").CombinedOutput()
				if err != nil {
					t.Fatalf("%s-save: %v\n%s", command, err, out)
				}
				for _, want := range []string{"--to-destination " + at(addr), "--probability 0.5", "--name SEEN", "MASQUERADE --random-fully"} {
					if !strings.Contains(string(out), want) {
						t.Errorf("no %q in\n%s", want, out)
					}
				}
			})
		}
	}
}

func at(addr string) string {
	if strings.Contains(addr, ":") {
		return "[" + addr + "]:8080"
	}
	return addr + ":8080"
}

const tables = `*nat
:SERVICES - [0:0]
-A PREROUTING -m comment --comment "portals" -j SERVICES
-A SERVICES -m addrtype --dst-type LOCAL -m mark --mark 0x4000/0x4000 -j RETURN
-A SERVICES -m statistic --mode random --probability 0.5 -j RETURN
-A SERVICES -m recent --name SEEN --rcheck --seconds 10800 --reap -j RETURN
-A SERVICES -p sctp -m sctp --dport 80 -j RETURN
-A SERVICES -p tcp -m multiport --dports 80,81 -j MARK --or-mark 0x4000
-A SERVICES -d %[1]s -p tcp -m tcp --dport 80 -m recent --name SEEN --set -j DNAT --to-destination %[2]s
-A SERVICES -p tcp --dport 82 -j REDIRECT --to-ports 8082
-A POSTROUTING -m physdev ! --physdev-is-in -j MASQUERADE --random-fully
COMMIT
*filter
-A FORWARD -m conntrack --ctstate INVALID -j DROP
-A FORWARD -s %[1]s -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*mangle
-A PREROUTING -p tcp -m socket --transparent -j MARK --set-mark 1
COMMIT
`
