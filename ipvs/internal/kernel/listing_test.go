// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"signalbox/proxier/plan"
)

const exampleListing = `IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:0050 rr ` + `
  -> 0AF40105:1F90      Masq    3      2          5         
  -> 0AF40106:1F90      Masq    0      0          0         
SCTP 0A600002:0B59 mh persistent 90000 FFFFFFFF
  -> 0AF40107:1F90      Route   1      1          0         
UDP  [fd00:0096:0000:0000:0000:0000:0000:0001]:0035 wrr ` + `
  -> [fd00:0244:0000:0000:0000:0000:0000:0005]:1F91      Masq    65535  0          1         
FWM  40000001 rr ` + `
  -> 0AF40108:1F90      Masq    1      0          0         
FWM  40000001 sh ` + `
  -> [fd00:0244:0000:0000:0000:0000:0000:0006]:1F90      Masq    1      0          0         
FWM  40000002 rr ` + `
TCP  0A600003:0050 rr ops ` + `
`

func TestParseListing(t *testing.T) {
	for family, want := range map[plan.Family]map[string]string{
		plan.IPv4: {
			"-f 1073741825":                 "rr 10.244.1.8:8080 -m weight 1 connections 0;",
			"-t 10.96.0.1:80":               "rr 10.244.1.5:8080 -m weight 3 connections 7;10.244.1.6:8080 -m weight 0 connections 0;",
			"--sctp-service 10.96.0.2:2905": "mh -p 10.244.1.7:8080 -g weight 1 connections 1;",
			"-t 10.96.0.3:80":               "rr -o ",
		},
		plan.IPv6: {
			"-f 1073741825":      "sh [fd00:244::6]:8080 -m weight 1 connections 0;",
			"-u [fd00:96::1]:53": "wrr [fd00:244::5]:8081 -m weight 65535 connections 1;",
		},
	} {
		found, err := parseListing(strings.NewReader(exampleListing), family)
		if err != nil {
			t.Fatal(err)
		}
		got := make(map[string]string)
		for key, s := range found {
			got[key.String()] = s.Scheduler + " "
			for _, d := range s.Destinations {
				got[key.String()] += fmt.Sprintf("%s %s weight %d connections %d;", d.Addr, d.Method, d.Weight, d.Connections)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", family, diff)
		}
	}
	for _, bad := range []string{"  -> 0AF40105 Masq 1 0 0", "  -> 0AF40105:1F90 Masq", "  -> 0AF40105:1F90 Masq x 0 0", "  -> [x]:1F90 Masq 1 0 0", "  -> 0AF40105:1F90 Mask 1 0 0"} {
		if _, err := parseListing(strings.NewReader("\n\n\nTCP  0A600001:0050 rr\n"+bad+"\n"), plan.IPv4); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

// TestDigest: everything but the order and the connections counts.
func TestDigest(t *testing.T) {
	digest := func(text string) uint64 {
		d, err := digestOf(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	const listing = `TCP  0A600001:0050 rr
  -> 0AF40105:1F90      Masq    3      1          2         
  -> 0AF40106:1F90      Masq    1      0          0         
UDP  0A600001:0035 rr
  -> 0AF40107:1F90      Masq    1      10         20        
`
	for _, test := range []struct {
		name, old, new string
		same           bool
	}{
		{"connections", "1          2 ", "22         45", true},
		{"weight", "Masq    3", "Masq    4", false},
		{"scheduler", "0050 rr", "0050 wrr", false},
		{"persistence", "0050 rr", "0050 rr persistent 90000 FFFFFFFF", false},
		{"forwarding method", "Masq    3", "Route   3", false},
		{"endpoint", "0AF40106", "0AF40108", false},
		{"order", listing, "UDP  0A600001:0035 rr\n  -> 0AF40107:1F90      Masq    1      0          0\nTCP  0A600001:0050 rr\n" +
			"  -> 0AF40106:1F90      Masq    1      0          0\n  -> 0AF40105:1F90      Masq    3      0          0\n", true},
		{"an endpoint of another server", "  -> 0AF40106:1F90      Masq    1      0          0         \nUDP  0A600001:0035 rr\n",
			"UDP  0A600001:0035 rr\n  -> 0AF40106:1F90      Masq    1      0          0         \n", false},
	} {
		changed := strings.Replace(listing, test.old, test.new, 1)
		if changed == listing {
			t.Fatalf("%s: nothing is changed", test.name)
		}
		if same := digest(listing) == digest(changed); same != test.same {
			t.Errorf("%s: the same digest: %v", test.name, same)
		}
	}
}
