// SPDX-License-Identifier: Apache-2.0

//go:build kind

package kind

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"
)

// answerWithin is how long this process waits for one answer before it counts
// as none.
const answerWithin = 10 * time.Second

// get makes one request on a connection of its own.
func get(ctx context.Context, url string) (status int, body string, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	alone := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := alone.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}

// ask asks netexec for something, from this process, by a new connection or
// socket.
func ask(ctx context.Context, network string, to netip.AddrPort, request string) (string, error) {
	if network == "tcp" {
		status, body, err := get(ctx, "http://"+to.String()+"/"+request)
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("%d %s", status, body)
		}
		return body, err
	}
	conn, err := net.Dial("udp", to.String())
	if err != nil {
		return "", err
	}
	defer conn.Close()
	return askOn(conn, request)
}

// askOn sends one datagram and takes the answer to it.
func askOn(conn net.Conn, request string) (string, error) {
	if err := conn.SetDeadline(time.Now().Add(answerWithin)); err != nil {
		return "", err
	}
	if _, err := conn.Write([]byte(request)); err != nil {
		return "", err
	}
	buf := make([]byte, 2048)
	n, err := conn.Read(buf)
	return string(buf[:n]), err
}

// outsideReaches wants answers from these servers and no others.
func (s *site) outsideReaches(network string, to netip.AddrPort, servers ...string) {
	s.Helper()
	slices.Sort(servers)
	s.eventually(fmt.Sprintf("from outside to %s by %s", to, network), func(ctx context.Context) error {
		var got []string
		for range 20 {
			a, err := ask(ctx, network, to, "hostname")
			if err != nil {
				return err
			}
			got = append(got, a)
		}
		slices.Sort(got)
		if got = slices.Compact(got); !slices.Equal(got, servers) {
			return fmt.Errorf("answers from %v, want %v", got, servers)
		}
		return nil
	})
}

// seesClient wants a server to see the address that this process has towards
// it.
func (s *site) seesClient(network string, to netip.AddrPort) {
	s.Helper()
	s.eventually(fmt.Sprintf("the client's address at %s by %s", to, network), func(ctx context.Context) error {
		route, err := net.Dial("udp", to.String())
		if err != nil {
			return err
		}
		own := route.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
		route.Close()
		a, err := ask(ctx, network, to, "clientip")
		if err != nil {
			return err
		}
		seen, err := netip.ParseAddrPort(a)
		if err == nil && seen.Addr().Unmap() != own {
			err = fmt.Errorf("%s was seen, want %s", seen, own)
		}
		return err
	})
}
