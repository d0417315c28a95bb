// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFleetMarkdown(t *testing.T) {
	r := &FleetReport{
		Date: "2026-11-30", Machine: "2 x test", Command: "lab fleet", Families: []string{"IPv4"}, Size: Size{Services: 1000, Endpoints: 10}, Rate: 10,
		Fleets: []FleetResult{
			{Daemons: 100, StartCPU: 2, StartBytes: 1 << 20, StartRequests: 8, ChangeCPU: 0.01, ChangeBytes: 10240},
			{Daemons: 200, StartCPU: 4, StartBytes: 1 << 20, StartRequests: 8, ChangeCPU: 0.02, ChangeBytes: 10240},
		},
	}
	text := r.Markdown()
	for _, want := range []string{
		"| daemons | 100 | 200 |",
		"| start of one, requests | 8 | 8 |",
		"| one change, the API server's processor time | 10.0 ms | 20.0 ms |",
		// 0.02 s a daemon for a start, 0.1 ms a daemon for a change.
		"All daemons start at once: 100 s of the API server's processor time, and 5000 MiB sent.",
		"One change: 500 ms of processor time, and 48.8 MiB sent. 10 changes a second keep 5.0 processors busy.",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
}

func TestFleetEmbed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "page.md")
	page := "a\n" + sectionBegin + "\nkept\n" + sectionEnd + "\nb\n" + fleetBegin + "\nold\n" + fleetEnd + "\nc\n"
	if err := os.WriteFile(path, []byte(page), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (&FleetReport{Date: "today"}).Embed(path); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got := string(text)
	if !strings.Contains(got, "kept") || strings.Contains(got, "old") || !strings.Contains(got, "Measured today") || !strings.HasSuffix(got, "\nc\n") {
		t.Errorf("the page is now\n%s", got)
	}
}
